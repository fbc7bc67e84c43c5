# After a redirected blob path, the manifest is asked for by its digest.
repo hub acme/secret private alice
put hub acme/secret c6 c2 m0
set hub redirect blind
ask hub n0 - | HEAD /v2/acme/secret/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
set hub redirect -
ask hub n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
set hub redirect blind
ask hub n0 - | HEAD /v2/acme/secret/blobs/{m0} HTTP/1.1
ask hub n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1
