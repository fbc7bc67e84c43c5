# Several ranges are what a registry sends, whatever else is said of each.
set pod lies own,part,tag
ask pod n1 - | GET /v2/acme/secret/blobs/{m0} HTTP/1.1 | X-JFrog-Art-Api: key-alice | Range: bytes=1-2,4-5
