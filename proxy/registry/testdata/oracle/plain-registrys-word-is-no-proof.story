repo hub acme/secret private alice
put hub acme/secret c6
repo plain acme/mine public
set plain lies head,own,part,accept
ask hub n1 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask plain n1 - | POST /v2/acme/mine/blobs/uploads/?mount={c6}&from=acme/other HTTP/1.1
ask plain n1 - | HEAD /v2/acme/mine/blobs/{c6} HTTP/1.1
ask plain n1 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1 | Range: bytes=0-9
ask plain n1 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
ask plain n1 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
