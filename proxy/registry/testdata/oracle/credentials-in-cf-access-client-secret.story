# Credentials may be in any field. A client with none, and one with a wrong key,
# is another one; in an outage too.
repo gh acme/secret private alice
put gh acme/secret c6 c2 m0
tag gh acme/secret latest m0
ask gh n0 - | GET /v2/acme/secret/manifests/latest HTTP/1.1 | CF-Access-Client-Secret: key-alice
ask gh n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1 | CF-Access-Client-Secret: key-alice
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | CF-Access-Client-Secret: key-alice
ask gh n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | CF-Access-Client-Secret: key-wrong
restart
set gh fail conn
ask gh n0 - | GET /v2/acme/secret/manifests/latest HTTP/1.1 | Authorization: Bearer made-up
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer made-up
