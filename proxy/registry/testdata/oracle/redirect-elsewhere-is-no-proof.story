# It redirects to a registry that has the blob, which doesn't give it.
repo hub acme/secret private alice
put hub acme/secret c6
repo evil acme/mine public
set evil lies elsewhere
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
