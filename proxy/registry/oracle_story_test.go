// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// A story is a list of lines, each a step:
//
//	repo REGISTRY REPOSITORY public|private [ACCOUNT,…]  who may read and write
//	put REGISTRY REPOSITORY CONTENT…                     it is there now
//	drop REGISTRY REPOSITORY CONTENT                     it is there no more
//	tag REGISTRY REPOSITORY TAG CONTENT
//	set REGISTRY redirect|hops|http|fail|quirks|lies VALUE   "-" is nothing
//	expire CREDENTIAL
//	clock DURATION                                       goes on
//	evict CONTENT                                        from weir's store
//	foreign CONTENT                                      a runtime's own store has it
//	restart                                              of weir
//	hold N                                               the next body of content stops at byte N
//	release                                              and goes on; so it does at any step but ask
//	cut N COUNT                                          the next COUNT bodies of content break off at its byte N
//	ask REGISTRY NETWORK CERTIFICATE | REQUEST LINE | FIELD… | body CONTENT
//	also | REQUEST LINE | …                              sent on the same connection, before the first is answered
//
// In requests {c1} is the digest of a content, {c1/512} the other one, {host} the
// registry's host, and {upload} where the registry expects the next part.

// teller plays a story.
type teller struct {
	w       *modelWorld
	side    *oracleSide
	counts  map[string]int // of what answers were
	pending []*talk        // while a body is held
	upload  string
}

// talk is a connection with its requests.
type talk struct {
	questions []*modelAsk
	answers   []*answered
	headed    chan struct{} // closed when the first answer's header is there
	done      chan struct{}
}

// answerTime is how long weir may take for an answer, on a machine that is busy.
const answerTime = 30 * time.Second

// tell plays a story and returns the first fault, at which line.
func tell(dir string, lines []string, counts map[string]int) (f *fault, at int, err error) {
	w := newModelWorld()
	side, err := newOracleSide(dir, func() time.Time {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.now
	})
	if err != nil {
		return nil, 0, err
	}
	defer side.close()
	t := &teller{w: w, side: side, counts: counts}
	defer func() { t.release() }()
	for i := 0; i < len(lines); i++ {
		group := lines[i : i+1]
		for i+1 < len(lines) && strings.HasPrefix(lines[i+1], "also ") && strings.HasPrefix(group[0], "ask ") {
			i++
			group = append(group, lines[i])
		}
		if f, err = t.step(group); f != nil || err != nil {
			return f, i, err
		}
	}
	f, err = t.finish()
	return f, len(lines) - 1, err
}

// release lets a held body go on.
func (t *teller) release() {
	t.w.mu.Lock()
	defer t.w.mu.Unlock()
	if t.w.hold != nil {
		close(t.w.hold.released)
		t.w.hold = nil
	}
}

// finish releases what is held, and checks all answers that are still to come.
func (t *teller) finish() (*fault, error) {
	t.release()
	var first *fault
	for _, k := range t.pending {
		select {
		case <-k.done:
		case <-time.After(answerTime):
			return &fault{"hang", "no answer to " + k.questions[0].raw}, nil
		}
	}
	if err := t.side.idle(); err != nil {
		return &fault{"hang", err.Error()}, nil
	}
	for _, k := range t.pending {
		for i, x := range k.questions {
			f := t.judge(x, k.answers[i])
			if first == nil {
				first = f
			}
		}
	}
	t.pending = nil
	return first, nil
}

func (t *teller) judge(x *modelAsk, got *answered) *fault {
	status := got.header.Get("Cache-Status")
	from := "forwarded"
	switch {
	case got.lost:
		t.counts["lost"]++
		return nil
	case got.err != nil:
		from = "broken"
	case got.status >= 400:
		from = "refused"
	case strings.Contains(status, "stale-if-error"):
		from = "stale"
	case strings.Contains(status, "following"):
		from = "transfer"
	case strings.Contains(status, "; hit"):
		from = "store"
	case strings.Contains(status, "stored"):
		from = "stored"
	}
	t.counts["from "+from]++
	if x.q == nil {
		if got.status/100 == 2 {
			return &fault{"difference", "what is no request is answered with " + fmt.Sprint(got.status)}
		}
		return nil
	}
	why, f := t.w.check(x, got, oracleTTL, oracleStale)
	if f != nil {
		f.text = fmt.Sprintf("%q from %s: %s", x.raw, x.q.net, f.text)
		return f
	}
	t.counts["because "+why]++
	return nil
}

var symbolRE = regexp.MustCompile(`\{(\w+)(/512)?\}`)

func (t *teller) expand(g *modelRegistry, s string) string {
	return symbolRE.ReplaceAllStringFunc(s, func(symbol string) string {
		m := symbolRE.FindStringSubmatch(symbol)
		c := modelContents[m[1]]
		switch {
		case m[1] == "host":
			return g.host
		case m[1] == "upload":
			return t.upload
		case c == nil:
			return symbol
		case m[2] != "":
			return c.sha512.String()
		}
		return c.sha256.String()
	})
}

// raw makes the bytes of a request.
func (t *teller) raw(g *modelRegistry, parts []string) string {
	line := strings.TrimSpace(t.expand(g, parts[0]))
	var head, body strings.Builder
	host := false
	for _, p := range parts[1:] {
		p = strings.TrimSpace(t.expand(g, p))
		if what, ok := strings.CutPrefix(p, "body "); ok {
			if c := modelContents[what]; c != nil {
				what = string(c.bytes)
			}
			body.WriteString(what)
			continue
		}
		host = host || strings.HasPrefix(p, "Host:")
		head.WriteString(p + "\r\n")
	}
	if !host && strings.HasSuffix(line, "HTTP/1.1") {
		head.WriteString("Host: " + g.host + "\r\n")
	}
	if body.Len() > 0 {
		head.WriteString("Content-Length: " + strconv.Itoa(body.Len()) + "\r\n")
	}
	return line + "\r\n" + head.String() + "\r\n" + body.String()
}

// step plays a line, or some asks of one connection.
func (t *teller) step(group []string) (*fault, error) {
	verb, rest, _ := strings.Cut(group[0], " ")
	if verb != "ask" && verb != "also" {
		if f, err := t.finish(); f != nil || err != nil {
			return f, err
		}
		return nil, t.change(verb, strings.Fields(rest))
	}
	head, _, _ := strings.Cut(rest, "|")
	to := strings.Fields(head)
	if verb == "also" || len(to) != 3 || t.w.regs[to[0]] == nil {
		return nil, nil // what it went with was taken out of the story
	}
	g := t.w.regs[to[0]]
	network, cert := to[1], strings.Trim(to[2], "-")
	if g.net != "" {
		network = g.net
	}
	if g.plain != "" {
		cert = ""
	}
	k := &talk{headed: make(chan struct{}), done: make(chan struct{})}
	var all strings.Builder
	for _, line := range group {
		x := &modelAsk{g: g, raw: t.raw(g, strings.Split(line, "|")[1:])}
		all.WriteString(x.raw)
		if r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(x.raw))); err == nil {
			body, _ := io.ReadAll(r.Body)
			x.q = &modelRequest{method: r.Method, path: r.URL.EscapedPath(), query: r.URL.RawQuery, host: r.Host, header: r.Header, net: network, cert: cert, body: body}
			if r.URL.User != nil {
				password, _ := r.URL.User.Password()
				x.q.userinfo = r.URL.User.Username() + ":" + password
			}
			t.w.ask(x)
		}
		k.questions = append(k.questions, x)
	}
	conn := t.side.connect(g, &modelWire{t.w, g, network, cert}, network, cert)
	go func() { _, _ = io.WriteString(conn, all.String()) }()
	go k.listen(conn)
	select {
	case <-k.headed:
	case <-time.After(answerTime):
		conn.Close()
		return &fault{"hang", "no answer to " + k.questions[0].raw}, nil
	}
	t.pending = append(t.pending, k)
	t.w.mu.Lock()
	held := t.w.hold != nil
	t.w.mu.Unlock()
	if held {
		return nil, nil
	}
	f, err := t.finish()
	for _, a := range k.answers {
		if a.status == http.StatusAccepted && a.header.Get("Location") != "" {
			t.upload = a.header.Get("Location")
		}
	}
	return f, err
}

// listen reads the answers.
func (k *talk) listen(conn net.Conn) {
	defer close(k.done)
	defer conn.Close()
	r := bufio.NewReader(conn)
	broken := false
	for i, x := range k.questions {
		a := &answered{header: http.Header{}, err: io.ErrUnexpectedEOF, lost: broken}
		k.answers = append(k.answers, a)
		if !broken {
			method := http.MethodGet
			if x.q != nil {
				method = x.q.method
			}
			var resp *http.Response
			if resp, a.err = http.ReadResponse(r, &http.Request{Method: method}); a.err == nil {
				a.status, a.header = resp.StatusCode, resp.Header
				if resp.ContentLength >= 0 && resp.Header.Get("Content-Length") == "" {
					a.header.Set("Content-Length", strconv.FormatInt(resp.ContentLength, 10))
				}
			}
			if i == 0 {
				close(k.headed)
			}
			if a.err == nil {
				a.body, a.err = io.ReadAll(resp.Body)
			}
			broken = a.err != nil || a.status != 0 && resp.Close
		} else if i == 0 {
			close(k.headed)
		}
	}
}

// change plays a step that isn't a request.
func (t *teller) change(verb string, args []string) error {
	w := t.w
	w.mu.Lock()
	defer w.mu.Unlock()
	need := map[string]int{"repo": 3, "put": 3, "drop": 3, "tag": 4, "set": 3, "expire": 1, "clock": 1, "evict": 1, "foreign": 1, "hold": 1, "tokens": 1, "cut": 2}[verb]
	if len(args) < need {
		return fmt.Errorf("%s %q: it needs %d words", verb, args, need)
	}
	var g *modelRegistry
	if need >= 3 {
		if g = w.regs[args[0]]; g == nil {
			return fmt.Errorf("%s: no registry %q", verb, args[0])
		}
	}
	set := func(s string) map[string]bool {
		m := make(map[string]bool)
		for v := range strings.SplitSeq(strings.Trim(s, "-"), ",") {
			if v != "" {
				m[v] = true
			}
		}
		return m
	}
	contents := map[string]int{"put": 2, "drop": 2, "tag": 3, "evict": 0, "foreign": 0}
	if at, ok := contents[verb]; ok {
		for _, name := range args[at:] {
			if modelContents[name] == nil {
				return fmt.Errorf("%s: no content %q", verb, name)
			}
		}
	}
	switch verb {
	case "repo":
		r := g.repo(args[1])
		r.public, r.readers = args[2] == "public", make(map[string]bool)
		if len(args) > 3 {
			r.readers = set(args[3])
		}
	case "put":
		for _, c := range args[2:] {
			g.repo(args[1]).has[c] = true
		}
	case "drop":
		delete(g.repo(args[1]).has, args[2])
	case "tag":
		g.repo(args[1]).tags[args[2]] = args[3]
	case "set":
		value := strings.Trim(args[2], "-")
		switch args[1] {
		case "redirect":
			g.redirect = value
		case "hops":
			g.hops, _ = strconv.Atoi(value)
		case "http":
			g.http = value == "yes"
		case "fail":
			g.fail = value
		case "quirks":
			g.quirks = set(args[2])
		case "lies":
			g.lies = set(args[2])
		default:
			return fmt.Errorf("set: no %q", args[1])
		}
	case "tokens":
		w.tokens = strings.Trim(args[0], "-")
	case "expire":
		w.expired[strings.Join(args, " ")] = true
	case "clock":
		d, err := time.ParseDuration(args[0])
		if err != nil {
			return err
		}
		w.now = w.now.Add(d)
	case "evict":
		t.side.evict(modelContents[args[0]])
	case "foreign":
		return t.side.foreign(modelContents[args[0]])
	case "restart":
		w.mu.Unlock() // it asks what time it is
		t.side.restart()
		w.mu.Lock()
	case "hold":
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		w.hold = &modelHold{at: n, released: make(chan struct{})}
	case "release":
	case "cut":
		at, err := strconv.Atoi(args[0])
		count, err2 := strconv.Atoi(args[1])
		if err = errors.Join(err, err2); err != nil {
			return err
		}
		w.cutAt, w.cuts = at, count
	default:
		return errors.New("no such step: " + verb)
	}
	return nil
}

// shorten takes lines out of a story for as long as the fault stays.
func shorten(lines []string, faulty func([]string) bool) []string {
	for n := len(lines) / 2; n >= 1; n /= 2 {
		for i := 0; i+n <= len(lines); {
			shorter := append(append([]string(nil), lines[:i]...), lines[i+n:]...)
			if faulty(shorter) {
				lines = shorter
			} else {
				i += n
			}
		}
	}
	return lines
}

// kinds of stories, each with what happens in it.
var storyKinds = []string{"plain", "credentials", "redirects", "outages", "hostile", "forms", "pushes", "arriving", "everything"}

// author makes up stories. Most of a story is about a few clients, registries
// and contents, or hardly anything in it would happen twice.
type author struct {
	*rand.Rand
	kind  string
	lines []string

	clients, registries, contents []string
}

func (a *author) one(of ...string) string { return of[a.IntN(len(of))] }

func (a *author) chance(percent int) bool { return a.IntN(100) < percent }

func (a *author) say(format string, args ...any) {
	a.lines = append(a.lines, fmt.Sprintf(format, args...))
}

var storyRepos = []string{"acme/secret", "library/open", "team/app"}

func (a *author) content() string {
	if a.chance(75) {
		return a.one(a.contents...)
	}
	return a.anyContent()
}

func (a *author) anyContent() string {
	return a.one("c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "m0", "m1", "m2", "m3", "m4")
}

func (a *author) registry() string {
	if a.chance(75) {
		return a.one(a.registries...)
	}
	return a.anyRegistry()
}

func (a *author) anyRegistry() string {
	switch a.kind {
	case "hostile":
		return a.one("hub", "hub", "evil", "evil", "evil", "gh", "plain", "pod", "fake")
	case "plain", "outages", "arriving", "pushes":
		return a.one("hub", "gh", "corp", "plain", "lan")
	}
	return a.one("hub", "hub", "gh", "gh", "corp", "fake", "plain", "pod", "lan", "evil")
}

func (a *author) repo() string {
	return a.one(storyRepos[0], storyRepos[0], storyRepos[1], storyRepos[2])
}

// write makes up a story of a kind, with so many steps after its beginning.
func (a *author) write(steps int) []string {
	a.lines, a.clients, a.registries, a.contents = nil, nil, nil, nil
	for range 4 {
		a.clients = append(a.clients, a.anyClient())
	}
	for range 2 {
		a.registries = append(a.registries, a.anyRegistry())
	}
	for range 4 {
		a.contents = append(a.contents, a.anyContent())
	}
	regs := []string{"hub", "gh", "corp", "fake", "plain", "pod", "lan", "evil"}
	for _, g := range regs {
		for _, r := range storyRepos {
			if r != "acme/secret" && a.chance(15) {
				continue
			}
			access := "private"
			if r == "library/open" || a.chance(20) {
				access = "public"
			}
			a.say("repo %s %s %s %s", g, r, access, a.one("alice", "alice", "alice,bob", "bob"))
			var contents []string
			for _, c := range []string{"c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "m0", "m1", "m2", "m3", "m4"} {
				if a.chance(map[bool]int{true: 92, false: 70}[g == "hub"]) {
					contents = append(contents, c)
				}
			}
			if len(contents) > 0 {
				a.say("put %s %s %s", g, r, strings.Join(contents, " "))
			}
			a.say("tag %s %s latest %s", g, r, a.one("m0", "m1", "m2", "m3"))
		}
	}
	if a.kind == "hostile" || a.kind == "everything" {
		a.say("set evil lies %s", a.lies())
	}
	if a.kind == "redirects" || a.kind == "everything" {
		for range 3 {
			a.redirect(a.registry())
		}
	}
	begin := len(a.lines)
	for len(a.lines)-begin < steps {
		a.step()
	}
	return a.lines
}

func (a *author) lies() string {
	var l []string
	for _, lie := range []string{"head", "own", "part", "elsewhere", "lan", "relay", "tag", "accept"} {
		if a.chance(35) {
			l = append(l, lie)
		}
	}
	if len(l) == 0 {
		return "-"
	}
	return strings.Join(l, ",")
}

func (a *author) redirect(g string) {
	a.say("set %s redirect %s", g, a.one("-", "blobs", "blobs", "all", "blind", "blind", "login"))
	if a.chance(30) {
		a.say("set %s hops %s", g, a.one("0", "1", "2"))
	}
	if a.chance(20) {
		a.say("set %s http %s", g, a.one("yes", "-"))
	}
}

func (a *author) step() {
	g, r, c := a.registry(), a.repo(), a.content()
	is := func(kind string) bool { return a.kind == kind || a.kind == "everything" }
	switch n := a.IntN(100); {
	case n < 2:
		a.say("repo %s %s %s %s", g, r, a.one("public", "private", "private"), a.one("alice", "alice", "alice,bob", "bob", ""))
	case n < 4:
		a.say("drop %s %s %s", g, r, c)
	case n < 5:
		a.say("put %s %s %s", g, r, c)
	case n < 7:
		a.say("tag %s %s latest %s", g, r, a.one("m0", "m1", "m2", "m3", "m4"))
	case n < 8 && a.chance(50):
		a.say("expire %s", a.one("Bearer alice-1", "Bearer bob-1", "key-alice", "session=alice", "key-bob"))
	case n < 10:
		a.say("clock %s", a.one("30s", "1m", "2m", "6m", "6m", "2h", "25h"))
	case n < 13:
		a.say("evict %s", c)
	case n < 14 && a.chance(30):
		a.say("restart")
	case n < 14:
		a.say("foreign %s", c)
	case n < 17:
		a.say("set %s quirks %s", g, a.one("-", "norange", "range416", "nodigest", "nolength", "norange,nodigest"))
	case n < 23 && is("outages"):
		// A client gets something, and then the registry gives no answer.
		who := a.member()
		if a.chance(60) {
			a.say("repo %s %s %s alice", g, r, a.one("public", "private"))
			a.say("put %s %s %s m0", g, r, c)
			a.ask(g, r, "m0", who, "GET", "manifests")
		}
		a.ask(g, r, c, who, "GET", a.kindOf(c))
		fail := a.one("conn", "silence", "429", "500", "503", "html200", "html403")
		a.say("set %s fail %s", g, fail)
		if a.chance(50) {
			a.say("clock %s", a.one("1m", "6m", "2h"))
		}
		for range 1 + a.IntN(3) {
			a.ask(g, r, a.one(c, c, "m0", ""), a.one(who, who, a.credentials()), "GET", a.one("blobs", "manifests"))
		}
		a.any(g)
		if a.chance(70) {
			a.say("set %s fail -", g)
		}
	case n < 26 && is("outages") && a.chance(70):
		// A repository is public, and then the token server gives no answer.
		who := a.one("n0", "n1") + " -" + a.one("", "", " | Authorization: Bearer "+placeholder)
		g = a.one("hub", "hub", g)
		if a.chance(70) {
			a.say("repo %s %s %s alice", g, r, a.one("public", "public", "private"))
			a.say("put %s %s %s m0", g, r, c)
			a.ask(g, r, "m0", a.member(), "GET", "manifests")
			a.ask(g, r, c, a.member(), "GET", a.kindOf(c))
		}
		a.say("tokens %s", a.one("conn", "429", "503", "html403"))
		if a.chance(30) {
			a.say("clock %s", a.one("1m", "6m", "25h"))
		}
		if a.chance(30) {
			a.say("repo %s %s private bob", g, r)
		}
		if a.chance(30) {
			a.say("set %s fail %s", g, a.one("conn", "503", "html403"))
		}
		from, _, _, _ := where(who)
		a.say("ask %s %s | GET /v2/ HTTP/1.1", g, from)
		a.say("ask %s %s | GET %s?service=x&scope=repository:%s:%s HTTP/1.1", g, from, ownRealm, a.one(r, r, a.repo()), a.one("pull", "pull", "pull", "pull,push", "*"))
		for range 1 + a.IntN(3) {
			a.ask(g, r, a.one(c, c, "m0", ""), a.one(who, who, a.credentials()), a.one("GET", "GET", "HEAD"), a.one("blobs", "manifests"))
		}
		if a.chance(80) {
			a.say("tokens -")
		}
		a.say("set %s fail -", g)
	case n < 25 && is("outages"):
		a.say("set %s fail %s", g, a.one("-", "-", "conn", "429", "503"))
	case n < 27 && is("redirects"):
		a.redirect(g)
	case n < 30 && is("hostile"):
		a.say("set %s lies %s", a.one("evil", "evil", "fake", "plain", "pod"), a.lies())
	case n < 38 && is("arriving"):
		big := a.one("c6", "c7")
		a.say("evict %s", big)
		if a.chance(60) {
			a.say("repo %s %s %s alice", g, r, a.one("public", "private"))
			a.say("put %s %s %s", g, r, big)
		}
		a.say("hold %s", a.one("65536", "70000", "99999"))
		a.ask(g, r, big, a.member(), "GET", "blobs")
		for range 1 + a.IntN(4) {
			g2 := a.one(g, g, a.registry())
			a.ask(g2, a.one(r, r, a.repo()), big, a.one(a.member(), a.credentials()), a.one("GET", "GET", "HEAD"), "blobs")
		}
		a.say("release")
	case n < 42 && is("arriving"):
		// A blob comes in ranges, or breaks off, and others ask for it, and for parts of it.
		big := a.one("c6", "c7")
		a.say("evict %s", big)
		if a.chance(70) {
			a.say("repo %s %s %s alice", g, r, a.one("public", "private"))
			a.say("put %s %s %s m0", g, r, big)
			a.ask(g, r, "m0", a.member(), "GET", "manifests")
		}
		if a.chance(50) {
			a.say("cut %s %s", a.one("65536", "70000", "80000", "99999"), a.one("1", "2", "4", "4"))
		}
		for range 1 + a.IntN(6) {
			g2 := a.one(g, g, g, a.registry())
			ranges := a.one("0-65535", "0-99999", "65536-", "65536-99999", "50000-79999", "80000-149999", "99998-", "0-", "1000-2000", "0-9,20-79999", "10-65535,65600-65700,99990-99999", "70000-80000,90000-99999", "5-9,80000-149999,150000-", "9-10,5-6", "")
			if ranges != "" {
				ranges = " | Range: bytes=" + ranges
			}
			a.askRange(g2, a.one(r, r, r, a.repo()), big, a.one(a.member(), a.member(), a.credentials()), ranges)
			if a.chance(15) {
				a.say("%s", a.one("clock 1m", "clock 6m", "clock 25h", "restart", "release"))
			}
			if a.chance(10) {
				a.say("repo %s %s private bob", g, r)
			}
		}
		a.say("cut 0 0")
		if a.chance(70) {
			a.ask(g, r, big, a.one(a.member(), a.credentials()), "GET", "blobs")
		}
	case n < 44 && is("pushes") || a.kind == "pushes" && n < 60:
		a.push(g, r, c)
	case n < 60 && is("forms"):
		a.any(g)
	case n < 63:
		who := a.one(a.member(), a.credentials())
		kind := a.kindOf(c)
		a.ask(g, r, c, who, "GET", kind)
		a.say("clock %s", a.one("1s", "1m", "4m", "6m"))
		if a.chance(30) {
			a.say("repo %s %s private bob", g, r)
		}
		a.ask(g, r, c, who, "GET", kind)
	case n < 72:
		a.ask(g, r, "", a.credentials(), a.one("GET", "HEAD"), "manifests")
	default:
		a.ask(g, r, c, a.credentials(), a.one("GET", "GET", "GET", "HEAD"), a.kindOf(c))
	}
}

// kindOf is what a content is asked for as.
func (a *author) kindOf(c string) string {
	if c[0] == 'm' != a.chance(8) {
		return "manifests"
	}
	return "blobs"
}

// credentials are where a request comes from and its fields.
func (a *author) credentials() string {
	if a.chance(80) {
		return a.one(a.clients...)
	}
	return a.anyClient()
}

// member is a client that may probably read what there is.
func (a *author) member() string {
	if a.chance(30) {
		return a.credentials()
	}
	return a.one("n0", "n1") + " - | Authorization: Bearer alice-2"
}

func (a *author) anyClient() string {
	net := a.one("n0", "n0", "n1", "n2")
	who := a.one("alice", "alice", "alice", "alice", "alice", "bob", "wrong")
	cert := "-"
	fields := ""
	n := a.IntN(100)
	if a.kind == "plain" || a.kind == "outages" || a.kind == "arriving" || a.kind == "pushes" {
		n = a.IntN(60)
	}
	switch {
	case n < 6:
	case n < 10:
		fields = " | Authorization: Bearer " + placeholder
	case n < 20:
		fields = " | Authorization: Bearer anon-" + a.one("1", "2")
	case n < 50:
		fields = " | Authorization: Bearer " + who + "-" + a.one("1", "1", "2")
	case n < 60:
		fields = " | Authorization: " + modelBasic(who+":password")
	case n < 66:
		fields = " | Authorization: Bearer " + who + "-1 | Authorization: Bearer " + a.one("wrong-1", "bob-1", "anon-1")
	case n < 70:
		fields = " | Cookie: session=" + who
	case n < 90:
		fields = " | " + a.one("X-JFrog-Art-Api", "Private-Token", "CF-Access-Client-Secret", "X-Registry-Auth", "X-Made-Up") + ": key-" + who
	case n < 94:
		fields = "?access_token=key-" + who
	case n < 97:
		fields = "@" + who + ":password"
	default:
		cert = "key-" + who
	}
	return net + " " + cert + fields
}

// where splits credentials into what comes before a request, userinfo, query and fields.
func where(who string) (from, userinfo, query, fields string) {
	from, fields, ok := strings.Cut(who, " | ")
	if ok {
		return from, "", "", " | " + fields
	}
	if from, query, ok = strings.Cut(who, "?"); ok {
		return strings.TrimSpace(from), "", "?" + query, ""
	}
	if from, userinfo, ok = strings.Cut(who, "@"); ok {
		return strings.TrimSpace(from), userinfo + "@", "", ""
	}
	return who, "", "", ""
}

// ask has a client ask for a content, or, if that is empty, for a tag.
func (a *author) ask(g, r, c, who, method, kind string) {
	ref := "latest"
	if c != "" {
		ref = "{" + c + a.one("", "", "", "", "/512") + "}"
		if ref == "{"+c+"/512}" && !a.chance(30) {
			ref = "{" + c + "}"
		}
	}
	from, userinfo, query, fields := where(who)
	target := "/v2/" + r + "/" + kind + "/" + ref + query
	if userinfo != "" {
		target = "http://" + userinfo + "{host}" + target
	}
	if percent := map[bool]int{true: 35, false: 8}[a.kind == "forms"]; a.chance(percent) {
		fields += " | Range: bytes=" + a.one("0-", "0-0", "0-9", "5-9", "100-", "-5", "1-2,4-5", "90000-", "9999999-", "x", "5-1")
	}
	if percent := map[bool]int{true: 15, false: 2}[a.kind == "forms"]; a.chance(percent) && c != "" {
		fields += " | " + a.one("If-None-Match", "If-Match", "If-Range") + `: "` + a.one(ref, "{c2}") + `"`
	}
	if kind == "manifests" && a.chance(50) {
		fields += " | Accept: " + a.one("*/*", docker2, "application/vnd.oci.image.index.v1+json, "+docker2)
	}
	a.say("ask %s %s | %s %s HTTP/1.1%s", g, from, method, target, fields)
	if a.chance(map[bool]int{true: 15, false: 2}[a.kind == "forms"]) {
		_, _, _, f2 := where(a.credentials())
		a.say("also | GET /v2/%s/blobs/{%s} HTTP/1.1%s", r, a.content(), f2)
	}
}

// askRange has a client ask for a blob, or a range of it.
func (a *author) askRange(g, r, c, who, ranges string) {
	from, userinfo, query, fields := where(who)
	target := "/v2/" + r + "/blobs/{" + c + "}" + query
	if userinfo != "" {
		target = "http://" + userinfo + "{host}" + target
	}
	a.say("ask %s %s | GET %s HTTP/1.1%s%s", g, from, target, fields, ranges)
}

// any has a client ask in a form that is unusual.
func (a *author) any(g string) {
	r, c := a.repo(), a.content()
	kind := a.kindOf(c)
	from, userinfo, query, fields := where(a.credentials())
	_ = userinfo
	p := "/v2/" + r + "/" + kind + "/{" + c + "}"
	version := a.one("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0")
	method := a.one("GET", "GET", "HEAD")
	switch a.IntN(18) {
	case 0:
		p = "/v2/"
	case 1:
		p = "/v2/" + r + "/tags/list"
	case 2:
		p = "/v2/" + r + "/referrers/{" + c + "}"
	case 3:
		p = strings.Replace(p, "acme/secret", "acme%2Fsecret", 1)
	case 4:
		p = strings.Replace(p, "/v2/", "/v2//", 1)
	case 5:
		p = strings.Replace(p, "/v2/", "/v2/x/../", 1)
	case 6:
		p = strings.Replace(p, "/"+kind+"/", "/"+strings.ToUpper(kind)+"/", 1)
	case 7:
		p = strings.ToUpper(p[:5]) + p[5:]
	case 8:
		p = strings.Replace(p, ":", "%3A", 1)
	case 9:
		fields += " | Host: " + a.one("other.test", "GHCR.IO", "registry-1.docker.io", "registry-1.docker.io:443", "{host}:443")
	case 10:
		p += "?" + a.one("a=b", "ns=docker.io", "x;y", "access_token=key-alice", "%zz")
		query = ""
	case 11:
		p = "https://{host}" + p
	case 12:
		p = "http://" + a.one("other.test", "evil.test", "registry-1.docker.io") + p
	case 13:
		p = "/v2/" + r + "/blobs/uploads/"
		method = a.one("GET", "POST")
	case 14:
		method = a.one("OPTIONS", "POST", "PUT", "PATCH", "DELETE")
	case 15:
		p = "/" + p
	case 16:
		p += a.one("/", "/x", "%00", "#x", ";x")
	case 17:
		p = "/v2/" + r + "/blobs/../" + kind + "/{" + c + "}"
	}
	if strings.Contains(p, "?") {
		query = ""
	}
	a.say("ask %s %s | %s %s%s %s%s", g, from, method, p, query, version, fields)
}

// push has a client push a content, in one of the ways.
func (a *author) push(g, r, c string) {
	from, _, _, fields := where(a.credentials())
	if a.chance(60) {
		from, fields = "n0 -", " | Authorization: Bearer alice-1"
	}
	body := a.one(c, c, c, "c3", "made up")
	switch {
	case c[0] == 'm' && a.chance(80):
		a.say("ask %s %s | PUT /v2/%s/manifests/%s HTTP/1.1%s | body %s", g, from, r, a.one("latest", "{"+c+"}"), fields, body)
	case a.chance(25):
		a.say("ask %s %s | POST /v2/%s/blobs/uploads/?mount={%s}&from=%s HTTP/1.1%s", g, from, r, c, a.repo(), fields)
	case a.chance(30):
		a.say("ask %s %s | POST /v2/%s/blobs/uploads/?digest={%s} HTTP/1.1%s | body %s", g, from, r, c, fields, body)
	default:
		a.say("ask %s %s | POST /v2/%s/blobs/uploads/ HTTP/1.1%s", g, from, r, fields)
		if a.chance(60) {
			a.say("ask %s %s | PATCH {upload} HTTP/1.1%s | body %s", g, from, fields, body)
			body = ""
		}
		end := ""
		if body != "" {
			end = " | body " + body
		}
		a.say("ask %s %s | PUT {upload}?digest={%s} HTTP/1.1%s%s", g, from, c, fields, end)
	}
	if a.chance(20) {
		a.say("ask %s %s | DELETE /v2/%s/%s/{%s} HTTP/1.1%s", g, from, r, a.kindOf(c), c, fields)
	}
	if a.chance(50) {
		a.ask(g, r, c, a.credentials(), "GET", a.kindOf(c))
	}
}

// parseStory reads a story from a file: lines that begin with # are for people.
func parseStory(b []byte) (lines []string) {
	for line := range bytes.Lines(b) {
		if text := strings.TrimSpace(string(line)); text != "" && !strings.HasPrefix(text, "#") {
			lines = append(lines, text)
		}
	}
	return lines
}
