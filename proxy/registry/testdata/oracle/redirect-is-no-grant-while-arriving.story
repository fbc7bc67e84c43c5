# The blob is still arriving for the client that may have it.
repo hub acme/secret private alice
put hub acme/secret c7
set gh redirect blind
repo gh library/open public
hold 70000
ask hub n0 - | GET /v2/acme/secret/blobs/{c7} HTTP/1.1 | Authorization: Bearer alice-1
ask gh n0 - | GET /v2/library/open/blobs/{c7} HTTP/1.1
release
