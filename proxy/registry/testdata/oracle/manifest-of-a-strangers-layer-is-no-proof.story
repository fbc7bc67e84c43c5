# It has a manifest of its own that lists another registry's layer.
repo hub acme/secret private alice
put hub acme/secret c6 c2
repo evil acme/mine public
put evil acme/mine m4 c4
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n0 - | GET /v2/acme/mine/manifests/{m4} HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
