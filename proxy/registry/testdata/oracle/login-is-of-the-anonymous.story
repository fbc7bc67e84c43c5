# What a registry answers to a wrong key is no answer to who comes without one.
repo gh team/app private alice,bob
put gh team/app c2 c3 c4 c5 c7 m1 m2 m3 m4
tag gh team/app latest m1
ask gh n0 - | GET /v2/team/app/manifests/latest HTTP/1.1 | Authorization: Bearer alice-2 | Accept: application/vnd.docker.distribution.manifest.v2+json
ask gh n0 - | GET /v2/ HTTP/1.1 | Private-Token: key-wrong
ask gh n0 - | GET /v2/ HTTP/1.1
