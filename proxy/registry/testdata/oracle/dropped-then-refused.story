# What the registry says isn't there any more isn't given, whatever else it gives to the client.
repo hub acme/secret private alice
put hub acme/secret c0 c1 c2 c3 c4 c5 c6 c7 m0 m1 m2 m4
ask hub n2 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-2
drop hub acme/secret c6
clock 6m
ask hub n2 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-2
ask hub n2 - | GET /v2/acme/secret/blobs/{c3} HTTP/1.1 | Authorization: Bearer alice-2
ask hub n2 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-2
