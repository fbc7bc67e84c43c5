repo gh acme/secret private alice
put gh acme/secret c6
ask gh n0 - | GET http://alice:password@{host}/v2/acme/secret/blobs/{c6} HTTP/1.1
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
ask gh n0 - | GET http://alice:wrong@{host}/v2/acme/secret/blobs/{c6} HTTP/1.1
