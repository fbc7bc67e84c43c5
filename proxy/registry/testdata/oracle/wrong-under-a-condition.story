# What is asked for under a condition passes through, whatever comes.
foreign c4
set fake lies head,own,part,tag,accept
ask fake n0 - | GET /v2/team/app/blobs/{c4} HTTP/1.1 | Authorization: Bearer anon-2 | If-None-Match: "{c4}"
