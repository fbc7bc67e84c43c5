repo gh acme/secret private alice
put gh acme/secret c6 c2 m0
tag gh acme/secret latest m0
ask gh n0 - | GET /v2/acme/secret/manifests/latest?access_token=key-alice HTTP/1.1
ask gh n0 - | GET /v2/acme/secret/manifests/{m0}?access_token=key-alice HTTP/1.1
ask gh n0 - | GET /v2/acme/secret/blobs/{c6}?access_token=key-alice HTTP/1.1
ask gh n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
ask gh n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1
ask gh n0 - | GET /v2/acme/secret/blobs/{c6}?access_token=key-wrong HTTP/1.1
set gh fail 503
ask gh n0 - | GET /v2/acme/secret/manifests/latest HTTP/1.1
ask gh n0 - | GET /v2/acme/secret/manifests/{m0} HTTP/1.1
