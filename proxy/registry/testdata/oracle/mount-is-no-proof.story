# It accepts each push and each mount.
repo hub acme/secret private alice
put hub acme/secret c6
set evil lies accept
repo evil acme/mine public
put evil acme/mine c3
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n0 - | GET /v2/acme/mine/blobs/{c3} HTTP/1.1
ask evil n0 - | POST /v2/acme/mine/blobs/uploads/?mount={c6}&from=acme/other HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
