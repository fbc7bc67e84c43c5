# What an anonymous client of one network is given isn't public in another.
repo lan acme/secret private alice
put lan acme/secret c6 c2 m0
tag lan acme/secret latest m0
ask lan n1 - | GET /v2/acme/secret/manifests/latest HTTP/1.1
ask lan n1 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
set lan fail conn
ask lan n2 - | GET /v2/acme/secret/manifests/latest HTTP/1.1
ask lan n2 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
