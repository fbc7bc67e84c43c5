# One runtime trusts a CA of its own for the name of a registry.
repo hub acme/secret private alice
put hub acme/secret c6 m0
tag hub acme/secret latest m0
repo fake acme/secret public
set fake lies head,own,tag
ask hub n0 - | GET /v2/acme/secret/manifests/latest HTTP/1.1 | Authorization: Bearer alice-1
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask fake n0 - | GET /v2/acme/secret/manifests/latest HTTP/1.1 | Authorization: Bearer alice-1
ask fake n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1
ask fake n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
set fake fail conn
ask fake n0 - | GET /v2/acme/secret/manifests/latest HTTP/1.1
