# A registry with a good certificate says of any digest that it has it.
repo hub acme/secret private alice
put hub acme/secret c6 c2 m0
set evil lies head,own
repo evil acme/mine public
ask hub n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/blobs/{m0} HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/manifests/{m0} HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/blobs/{c2} HTTP/1.1
