# An empty blob has no bytes to show. That is no outage: who is refused gets nothing.
repo gh library/open public alice
put gh library/open c0 m1
ask gh n0 - | GET /v2/library/open/manifests/{m1} HTTP/1.1 | Authorization: Bearer alice-1
ask gh n0 - | GET /v2/library/open/blobs/{c0} HTTP/1.1 | Authorization: Bearer alice-2
clock 6m
repo gh library/open private alice
ask gh n0 - | GET /v2/library/open/blobs/{c0} HTTP/1.1 | Authorization: Bearer bob-1
