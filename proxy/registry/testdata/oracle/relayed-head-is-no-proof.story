# It passes HEAD on to the registry that has the blob, with credentials of its own.
repo hub acme/secret private alice
put hub acme/secret c6
repo evil acme/mine public
set evil lies relay
ask hub n0 - | GET /v2/acme/secret/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-1
ask evil n0 - | GET /v2/acme/mine/blobs/{c6} HTTP/1.1
