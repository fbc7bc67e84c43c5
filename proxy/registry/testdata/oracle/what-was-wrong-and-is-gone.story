repo hub acme/secret public alice,bob
put hub acme/secret c0 c1 c2 c3 c6 c7 m0 m1 m2 m3 m4
tag hub acme/secret latest m0
repo hub library/open public alice
put hub library/open c0 c1 c2 c3 c4 c5 c6 c7 m0 m1 m2 m3 m4
repo gh acme/secret private bob
put gh acme/secret c0 c1 c2 c3 c4 c6 c7 m0 m2 m3 m4
tag gh acme/secret latest m3
repo gh library/open public bob
tag gh library/open latest m0
tag plain library/open latest m3
repo plain team/app private bob
put plain team/app c0 c1 c2 c5 c6 c7 m0 m1 m2
tag plain team/app latest m0
put pod acme/secret c0 c1 c3 c5 c6 c7 m0 m1 m2 m3 m4
tag pod acme/secret latest m0
put pod library/open c0 c1 c2 c4 c5 c6 m0 m1 m4
repo pod team/app public alice
put pod team/app c1 c2 c3 c5 c6 c7 m0 m1 m2 m3 m4
repo lan library/open public alice
put lan library/open c1 c2 c3 c4 c6 c7 m0 m1 m2 m3 m4
tag lan library/open latest m0
repo evil acme/secret private alice
repo evil library/open public alice
put evil library/open c2 c3 c4 c6 c7 m0 m2 m3 m4
tag evil library/open latest m1
repo evil team/app private alice
put evil team/app c0 c2 c3 c5 c6 c7 m0 m1 m2 m3 m4
tag evil team/app latest m2
set evil lies part,accept
ask evil n0 - | GET /v2/team/app/blobs/{c7} HTTP/1.1 | Authorization: Bearer alice-2
ask evil n0 - | GET /v2/team/app/blobs/{c7/512} HTTP/1.1 | Authorization: Bearer alice-2
ask hub n0 - | GET /v2/team/app/manifests/{c0} HTTP/1.1 | Range: bytes=0-0
ask evil n0 - | GET /v2/acme/secret/blobs/{c2/512} HTTP/1.1 | X-Made-Up: key-alice
