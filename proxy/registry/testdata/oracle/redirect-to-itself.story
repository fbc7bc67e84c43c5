# What a registry redirects to itself, at another repository, counts where it was asked for.
repo fake acme/secret private alice
put fake acme/secret c0 c1 c2 c3 c4 c7 m0 m1 m3 m4
set fake lies elsewhere
ask fake n0 - | GET /v2/team/app/blobs/{c7} HTTP/1.1 | Authorization: Bearer alice-1
set fake fail html200
ask fake n0 - | GET /v2/team/app/blobs/{c7} HTTP/1.1 | Authorization: Bearer alice-1
