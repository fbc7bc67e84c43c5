repo plain acme/app private alice
put plain acme/app c6
repo pod acme/app public
ask plain n1 - | GET /v2/acme/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask pod n2 - | GET /v2/acme/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask pod n2 - | GET /v2/acme/app/blobs/{c6} HTTP/1.1
