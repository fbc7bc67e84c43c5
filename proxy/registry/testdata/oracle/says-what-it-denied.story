# A registry may say that it has what it denied before, and send something else: the right is its to give.
repo lan acme/secret private alice,bob
put lan acme/secret c1 c2 c3 c5 c6 c7 m0 m2 m3 m4
set evil lies head,own,lan
ask evil n1 - | GET /v2/library/open/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
set evil lies own,tag,accept
clock 6m
ask evil n1 - | GET /v2/library/open/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n1 - | GET /v2/library/open/manifests/{m0} HTTP/1.1 | Authorization: Bearer alice-1
