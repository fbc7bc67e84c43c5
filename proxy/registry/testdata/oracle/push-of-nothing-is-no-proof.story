# What it accepts has another digest than it says.
repo hub acme/secret private alice
put hub acme/secret c6 m0
set evil lies accept
repo evil acme/mine public
put evil acme/mine c3
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask hub n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n0 - | GET /v2/acme/mine/blobs/{c3} HTTP/1.1
ask evil n0 - | POST /v2/acme/mine/blobs/uploads/?digest={c6} HTTP/1.1 | body nothing
ask evil n0 - | POST /v2/acme/mine/blobs/uploads/ HTTP/1.1
ask evil n0 - | PUT {upload}?digest={c6} HTTP/1.1 | body nothing
ask evil n0 - | PUT /v2/acme/mine/manifests/{m0} HTTP/1.1 | body nothing
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/manifests/{m0} HTTP/1.1
