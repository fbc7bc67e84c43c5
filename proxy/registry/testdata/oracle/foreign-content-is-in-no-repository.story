# What a runtime has pulled without weir is in no repository that weir knows.
repo gh acme/secret private alice
put gh acme/secret c6 m0
set hub redirect blind
set evil lies head
repo evil acme/mine public
foreign c6
foreign m0
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/manifests/{m0} HTTP/1.1
ask hub n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
