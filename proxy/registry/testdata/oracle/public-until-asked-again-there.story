repo evil team/app public bob
put evil team/app c0 c1 c2 c3 c5 c6 m0 m2 m4
ask evil n0 - | GET /v2/team/app/manifests/{m2} HTTP/1.1 | Authorization: Bearer anon-2 | Accept: application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.v2+json
clock 6m
repo evil team/app private alice
ask evil n1 - | GET /v2/team/app/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-2 | Accept: */*
set evil fail conn
ask evil n0 - | GET /v2/team/app/blobs/{m0} HTTP/1.1 | Authorization: Bearer weir.anonymous
