# A right is to a repository, also to what was not there when its client asked for it.
ask corp n0 - | HEAD /v2/library/open/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
repo corp library/open public alice
put corp library/open c6 m0
ask corp n0 - | GET /v2/library/open/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
ask corp n0 - | GET /v2/library/open/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-2
repo corp library/open private bob
ask corp n0 - | GET /v2/library/open/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
