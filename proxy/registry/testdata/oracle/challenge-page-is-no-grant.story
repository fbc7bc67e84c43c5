# A page of HTML with the status 200 isn't the registry's answer.
repo gh acme/secret private alice
put gh acme/secret c6
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
set gh fail html200
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer bob-1
