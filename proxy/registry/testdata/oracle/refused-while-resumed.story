# A refusal of what is fetched for a client is a refusal of that client.
repo lan team/app private alice
put lan team/app c6 m0
cut 80000 4
ask lan n0 - | GET /v2/team/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-2 | Range: bytes=0-65535
repo lan team/app private bob
ask lan n0 - | GET /v2/team/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-2 | Range: bytes=0-99999
ask lan n0 - | GET /v2/team/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-2 | Range: bytes=65536-
