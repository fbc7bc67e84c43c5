# HTTP/1.0 need not name a host: what it deletes is gone all the same.
repo hub team/app private alice
put hub team/app c0 c1 c2 c3 c4 c5 c6 c7 m0 m1 m2 m3 m4
ask hub n0 - | GET /v2/team/app/blobs/{c7} HTTP/1.1 | Authorization: Bearer alice-1
ask hub n0 - | DELETE /v2/team/app/blobs/{c7} HTTP/1.0 | Authorization: Bearer alice-1
ask hub n0 - | GET /v2/team/app/blobs/{c7} HTTP/1.1 | Authorization: Bearer alice-1 | Range: bytes=5-9
