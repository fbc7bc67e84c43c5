put corp acme/secret c0 c3 c4 c6 c7 m0 m2 m3
tag corp acme/secret latest m2
repo corp library/open public alice,bob
put corp library/open c2 c5 c6 m0 m2 m4
tag corp library/open latest m0
repo corp team/app private bob
put corp team/app c0 c1 c2 c4 c5 c6 c7 m1 m3 m4
tag corp team/app latest m0
repo fake acme/secret private alice
put fake acme/secret c0 c1 c3 c4 c5 c6 c7 m0 m1 m2 m3 m4
put fake library/open c0 c3 c4 c5 c6 c7 m0 m4
tag fake library/open latest m1
tag fake team/app latest m0
repo plain acme/secret private alice,bob
put plain acme/secret c0 c3 c4 c7 m0 m1 m2
tag plain acme/secret latest m2
repo plain library/open public bob
put plain library/open c1 c2 c3 c4 c5 c6 c7 m0 m1 m2 m3 m4
tag plain library/open latest m3
repo plain team/app public alice
put plain team/app c1 c2 c4 c5 c7 m1 m2
tag plain team/app latest m2
repo pod acme/secret private alice
put pod acme/secret c3 c4 c5 c6 c7 m0 m3 m4
tag pod acme/secret latest m2
repo pod team/app private alice
put pod team/app c1 c2 c3 c4 c5 c6 c7 m0 m2 m3 m4
tag pod team/app latest m1
repo lan acme/secret public bob
put lan acme/secret c0 c2 c4 c6 c7 m0 m2 m3 m4
tag lan acme/secret latest m0
repo lan library/open public bob
put lan library/open c0 c1 c2 c3 c6 c7 m1 m3
tag lan library/open latest m3
repo evil acme/secret private alice
put evil acme/secret c0 c1 c2 c6 c7 m0 m1 m3
tag evil acme/secret latest m0
repo evil library/open public alice
tag evil library/open latest m3
repo evil team/app private alice
set evil lies own,part,accept
ask pod n0 - | GET /v2/acme/secret/blobs/{m3} HTTP/1.1 | Authorization: Bearer alice-1
clock 4m
ask pod n0 - | GET /v2/acme/secret/blobs/{m3} HTTP/1.1 | Authorization: Bearer alice-1 | If-Range: "{c2}"
ask gh n0 - | GET /v2/library/open/manifests/{m1} HTTP/1.1 | Authorization: Bearer alice-1 | Accept: */*
ask gh n0 - | GET /v2/library/open/manifests/{m1} HTTP/1.1 | Authorization: Bearer alice-1 | Range: bytes=0- | Accept: */*
ask evil n1 - | GET /v2/acme/secret/blobs/{c7} HTTP/1.1 | Authorization: Bearer alice-2
clock 4m
ask evil n1 - | GET /v2/acme/secret/blobs/{c7} HTTP/1.1 | Authorization: Bearer alice-2
also | GET /v2/acme/secret/blobs/{m4} HTTP/1.1 | X-Registry-Auth: key-alice
