# A refusal of what is asked for in the absolute form isn't read, as nothing of that form is.
repo pod acme/secret public bob
put pod acme/secret c0 c1 c2 c3 c4 c5 c6 m2 m4
ask pod n1 - | HEAD /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1 | Authorization: Bearer anon-1 | Range: bytes=1-2,4-5
also | GET /v2/acme/secret/blobs/{c6} HTTP/1.1
repo pod acme/secret private alice
ask pod n1 - | GET https://{host}/v2/acme/secret/manifests/{m3} HTTP/1.1 | Authorization: Bearer alice-1 | Authorization: Bearer anon-1
ask pod n1 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1 | Authorization: Bearer anon-1
