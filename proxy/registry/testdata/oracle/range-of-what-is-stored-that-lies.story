# A registry that lies may give a range, and refuse the whole: who asks for a range of what is kept is given what it is given there.
repo evil library/open public alice
put evil library/open c0 c1 c3 c4 c6 c7 m1 m3 m4
set evil lies part,relay
ask evil n0 - | GET /v2/library/open/blobs/{c4} HTTP/1.1 | Authorization: Bearer alice-2
repo evil acme/secret private bob
ask evil n2 - | GET /v2/acme/secret/blobs/{c4} HTTP/1.1 | Authorization: Bearer weir.anonymous | Range: bytes=1-2,4-5
