# A registry behind a login page redirects every client without credentials to it.
repo gh acme/secret private alice
put gh acme/secret c6
set gh redirect login
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
