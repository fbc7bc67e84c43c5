# A registry makes up a range of what it hasn't: whoever asks for all of it next doesn't get it whole.
set evil lies head,part,relay,tag
ask evil n1 - | GET /v2/team/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-2 | Range: bytes=0-9
ask evil n1 - | GET /v2/team/app/blobs/{c6} HTTP/1.1 | Authorization: Bearer alice-2
