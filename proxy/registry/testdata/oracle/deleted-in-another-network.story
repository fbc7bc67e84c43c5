# What is deleted in one network stays known in another, of a registry that only a runtime's own CA
# speaks for: it may be another one there.
repo corp acme/secret private alice
put corp acme/secret c0 c1 c2 c3 c5 c6 m0 m1 m2 m4
ask corp n2 - | GET /v2/acme/secret/blobs/{c2} HTTP/1.1 | Authorization: Basic YWxpY2U6cGFzc3dvcmQ=
ask corp n0 - | DELETE /v2/acme/secret/blobs/{c2} HTTP/1.1 | Authorization: Bearer alice-1
ask corp n2 - | GET /v2/acme/secret/blobs/{c2} HTTP/1.1 | Authorization: Bearer alice-1
ask corp n2 - | GET /v2/acme/secret/blobs/{c0} HTTP/1.1 | Authorization: Bearer alice-1
ask corp n2 - | GET /v2/acme/secret/blobs/{c2} HTTP/1.1 | Authorization: Bearer alice-1
