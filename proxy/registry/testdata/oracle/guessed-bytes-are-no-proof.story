# It answers ranges with what can be guessed, and zeros.
repo hub acme/secret private alice
put hub acme/secret c6
set evil lies head,part
repo evil acme/mine public
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1 | Range: bytes=0-9
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1 | Range: bytes=100-
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
