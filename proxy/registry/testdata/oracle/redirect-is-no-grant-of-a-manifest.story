# The same for a manifest that is asked for as a blob, and then as what it is.
repo hub acme/secret private alice
put hub acme/secret c6 c2 m0
set gh redirect blind
repo gh library/open public
ask hub n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
ask gh n0 - | GET /v2/library/open/blobs/{m0} HTTP/1.1
ask gh n0 - | GET /v2/library/open/manifests/{m0} HTTP/1.1
