# The one registry takes the first Authorization field, the other the last.
repo hub acme/secret private alice
put hub acme/secret c6
repo gh acme/secret private alice
put gh acme/secret c6
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1 | Authorization: Bearer wrong-1
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer wrong-1 | Authorization: Bearer alice-1
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer wrong-1 | Authorization: Bearer alice-1
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1 | Authorization: Bearer wrong-1
