# The same of a manifest.
repo hub acme/secret private alice
put hub acme/secret c0 c1 c2 c3 c4 c5 c6 c7 m0 m2 m3 m4
ask hub n2 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-2 | Accept: application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.v2+json
drop hub acme/secret m0
ask hub n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-2 | Accept: */*
ask hub n0 - | GET /v2/acme/secret/blobs/{c1} HTTP/1.1 | Authorization: Bearer alice-2
ask hub n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-2
