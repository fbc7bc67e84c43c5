# Of a blob that arrives, and whose length the registry doesn't say, no range can be
# asked for. That is no outage either.
repo gh acme/app public alice
put gh acme/app c6 c7 m0
ask gh n0 - | GET /v2/acme/app/manifests/{m0} HTTP/1.1
ask gh n0 - | GET /v2/acme/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
clock 6m
repo gh acme/app private alice
set gh quirks nolength
evict c6
hold 70000
ask gh n0 - | GET /v2/acme/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask gh n0 - | GET /v2/acme/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer bob-1
release
