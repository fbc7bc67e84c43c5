# It says by HEAD that its tag is a manifest of another registry's.
repo hub acme/secret private alice
put hub acme/secret m0
repo evil acme/mine public
put evil acme/mine m1
tag evil acme/mine latest m1
ask hub n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n0 - | GET /v2/acme/mine/manifests/latest HTTP/1.1
tag evil acme/mine latest m2
set evil lies tag
ask evil n0 - | HEAD /v2/acme/mine/manifests/latest HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/manifests/latest HTTP/1.1
ask evil n0 - | GET /v2/acme/mine/manifests/{m0} HTTP/1.1
