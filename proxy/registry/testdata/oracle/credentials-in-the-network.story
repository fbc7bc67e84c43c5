# This registry knows clients by their address alone.
repo lan acme/secret private alice
put lan acme/secret c6
ask lan n1 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
ask lan n1 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
ask lan n2 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
