# It answers each GET with 200 and bytes of its own.
repo hub acme/secret private alice
put hub acme/secret c6
set evil lies own
repo evil acme/mine public
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
