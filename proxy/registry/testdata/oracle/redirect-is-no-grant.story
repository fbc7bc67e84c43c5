# A registry that redirects every blob path without a look has granted nothing.
repo hub acme/secret private alice
put hub acme/secret c6 c2 m0
set gh redirect blind
repo gh library/open public
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
ask gh n0 - | GET /v2/library/open/blobs/{c6} HTTP/1.1
