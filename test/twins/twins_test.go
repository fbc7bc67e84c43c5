// SPDX-License-Identifier: Apache-2.0

// Package twins plays the same stories on two nodes, one with weir's agent and
// one without, and compares them: outcome, error text, what the registry was
// asked, and time. A story is a client, a way of the registry, a fault of the
// network and a moment in the agent's life.
package twins

import (
	"cmp"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"weir/test/lab"
)

var (
	playFor = flag.Duration("twins.for", 0, "for how long random stories are played, after all the others; the time is a matter too")
	seed    = flag.Uint64("twins.seed", uint64(time.Now().UnixNano()), "of the random stories")
	part    = flag.String("twins.part", "1/1", "which part, and of how many, of the stories of each client with each way, fault and moment is played with -twins.for")
	only    = flag.String("twins.only", "", "play only the story of this name, as in a failure's message, or those whose names match this regular expression")
	out     = flag.String("twins.out", "", "file for the table; empty means the test's log")
)

// maxAdded is how much later a story may end with weir. It counts in `make twins`.
const maxAdded = time.Second

// TestMain lets this binary be the raw client, under another name.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "raw" {
		if err := raw(os.Args[2:]); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// world is an internet with three registries, and the two nodes.
type world struct {
	*lab.Internet
	t               *testing.T
	hub, ghcr, corp *lab.Registry
	sides           [2]*side // without weir, and with it

	stories int
	mu      sync.Mutex
	plays   map[string]*play // that run, by repository
	hosts   time.Time        // when /etc/hosts was last changed
	results []*result
	// composed says how many stories were played besides the fixed ones.
	composed string
}

// side is one of the two nodes.
type side struct {
	*lab.Node
	w       *world
	agent   *lab.Agent // nil for the node without weir
	clients map[string]*client
	raw     string // the raw client's program
	current *play  // what requests belong to that name no repository
}

// story is what is played on both.
type story struct {
	client, op, way, fault, moment string
}

func (s story) String() string {
	return strings.Join(slices.DeleteFunc([]string{s.client, s.op, s.way, s.fault, s.moment}, func(s string) bool { return s == "" }), " · ")
}

// play is a story at one side.
type play struct {
	*side
	story
	c     *client
	way   way
	reg   *lab.Registry
	repo  string
	tag   string
	im    lab.Pushed
	env   []string // of tools
	begun chan struct{}
	most  *atomic.Int64 // requests at once, of the play without weir

	mu    sync.Mutex
	now   int64 // requests that run
	asked []request
	count map[string]int // for ways that change
	slow  string         // the blob that is slow
	once  sync.Once

	out  string
	err  error
	took time.Duration
}

func (p *play) ref() string {
	host := p.reg.Host
	if p.reg == p.w.hub {
		host = "docker.io"
	}
	return host + "/" + p.repo + ":" + p.tag
}

// login is the user for registries that want one.
func (p *play) login() []string {
	if p.reg == p.w.corp {
		return []string{user, password}
	}
	return nil
}

const user, password = "alice", "wonderland-twins"

// request is one that came to a host.
type request struct {
	method, host, path string
	status             int
	agent, rng         string
}

func (r request) String() string {
	return fmt.Sprintf("%s %s%s → %d", r.method, r.host, r.path, r.status)
}

// result is how a story went at both sides.
type result struct {
	story
	errs   [2]string
	took   [2]time.Duration
	faults []string // what is worse with weir
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{Internet: lab.NewInternet(t), t: t, plays: make(map[string]*play)}
	w.hub, w.ghcr, w.corp = w.DockerHub(), w.Registry("ghcr.io"), w.Registry("registry.corp")
	for _, r := range []*lab.Registry{w.hub, w.ghcr, w.corp} {
		r.User(user, password)
		r.Push("base/warm:1", lab.Image{Layers: []int{1000, 150_000}, Seed: 4})
		r.Front(func(rw http.ResponseWriter, req *http.Request, next http.Handler) { w.front(req.Host, rw, req, next) })
	}
	for _, h := range []string{"cdn1.example", "cdn2.example", "upload.example"} {
		w.HTTPS(h, false, http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) { w.front(h, rw, req, w.ghcr.Open()) }))
	}
	w.HTTPSAs("upload.example", "upload.example", 8443, false, http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		w.front("upload.example:8443", rw, req, w.ghcr.Open())
	}))
	w.HTTPSAs(newAddress, "ghcr.io", 443, false, http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		w.front("ghcr.io, at its new address", rw, req, w.ghcr.Open())
	}))
	w.Proxy(proxyHost, 3128)
	w.ghcr.Push("base/base:1", lab.Image{Layers: []int{150_000, 1000}, Seed: 3})
	for i := range w.sides {
		s := &side{Node: w.Node(), w: w}
		w.sides[i] = s
		if i == 1 {
			s.agent = s.Agent("--registry", w.corp.Host)
		}
		s.startClients()
	}
	return w
}

var (
	repoRE  = regexp.MustCompile(`(?:repository:|/v2/)(twins/s[0-9]+[ab])\b`)
	pathREs = []struct {
		re *regexp.Regexp
		to string
	}{
		{regexp.MustCompile(`twins/s[0-9]+[ab]`), "R"},
		{regexp.MustCompile(`twins%2Fs[0-9]+[ab]`), "R"},
		{regexp.MustCompile(`/blobs/uploads/[^/ ?"]+`), "/blobs/uploads/U"},
		{regexp.MustCompile(`[0-9a-f]{64}`), "D"},
		{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22,}`), "U"},
		{regexp.MustCompile(`\b[0-9a-f]{12}\b`), "D"},
		{regexp.MustCompile(`(_state|sig|token)=[^ &"]+`), "$1=S"},
		{regexp.MustCompile(`s[0-9]+[ab]\b`), "S"},
		{regexp.MustCompile(`10\.[0-9]+\.[0-9]+\.[0-9]+:[0-9]+|\[2001:db8:77:[0-9a-f:]+\]:[0-9]+`), "C"},
		{regexp.MustCompile(`[0-9]{4}[-/][0-9]{2}[-/][0-9]{2}[T ][0-9:.]+Z?`), "T"},
		{regexp.MustCompile(`boundary=[0-9a-f]+`), "boundary=B"},
		{regexp.MustCompile(` in (box [0-9]+ on )?node [0-9]+:`), " in the node:"},
		{regexp.MustCompile(`/tmp/[^ :"]+|/var/tmp/[^ :"]+`), "/tmp/F"},
		{regexp.MustCompile(`\b[0-9.]+ ?(ms|s|B|kB|MB|MiB|KiB)(/s)?\b`), "N$1$2"},
		{regexp.MustCompile(` +`), " "}, // what is between columns depends on the figures
	}
)

// normal takes out of a text what differs from play to play.
func normal(s string) string {
	for _, r := range pathREs {
		s = r.re.ReplaceAllString(s, r.to)
	}
	return s
}

// front notes what is asked of a host, and has the way of the play that it belongs
// to answer.
func (w *world) front(host string, rw http.ResponseWriter, r *http.Request, next http.Handler) {
	where := r.URL.Path + " " + r.URL.RawQuery
	if r.URL.Path == "/token" {
		_ = r.ParseForm()
		where = strings.Join(r.Form["scope"], " ")
	}
	addr, _ := netip.ParseAddrPort(r.RemoteAddr)
	w.mu.Lock()
	var p *play
	if m := repoRE.FindStringSubmatch(where); m != nil {
		p = w.plays[m[1]]
	} else if !strings.Contains(where, "base/") { // which is not part of a story
		for _, s := range w.sides {
			if s != nil && s.Owns(addr.Addr()) {
				p = s.current
			}
		}
	}
	w.mu.Unlock()
	if p == nil {
		next.ServeHTTP(rw, r)
		return
	}
	rec := &recorded{ResponseWriter: rw, answered: func(status int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.asked = append(p.asked, request{method: r.Method, host: host, path: normal(r.URL.Path), status: status, agent: r.UserAgent(), rng: r.Header.Get("Range")})
	}}
	defer func() {
		if rec.status == 0 {
			rec.answered(0)
		}
	}()
	if strings.Contains(r.URL.Path, "/blobs/") {
		p.once.Do(func() { close(p.begun) })
	}
	if p.way.serve == nil {
		next.ServeHTTP(rec, r)
		return
	}
	p.way.serve(p, rec, r, next)
}

// recorded keeps an answer's status, and lets its head be changed.
type recorded struct {
	http.ResponseWriter
	head     func(h http.Header, status int) int
	status   int
	answered func(status int) // comes before the client has the answer, and may end
}

func (w *recorded) WriteHeader(code int) {
	if code >= 100 && code < 200 {
		w.ResponseWriter.WriteHeader(code)
		return
	}
	if w.status == 0 {
		if w.head != nil {
			code = w.head(w.Header(), code)
		}
		w.status = code
		w.answered(code)
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *recorded) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(b)
}

func (w *recorded) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// begin makes the play of a story at a side.
func (w *world) begin(st story, i, number int) *play {
	p := &play{side: w.sides[i], story: st, tag: "1", begun: make(chan struct{}), count: make(map[string]int)}
	p.repo = fmt.Sprintf("twins/s%d%c", number, 'a'+i)
	p.c = p.clients[st.client]
	p.way = find(ways, st.way, func(w way) string { return w.name })
	p.reg = w.ghcr
	if p.way.registry != nil {
		p.reg = p.way.registry(w)
	}
	size := 200_000
	if find(moments, st.moment, func(m moment) string { return m.name }).during != nil {
		size = 1 << 20
	}
	im := lab.Image{Layers: []int{size, 2000}, Seed: uint64(100 + number), OCI: number%2 == 0, Index: number%3 == 0}
	if p.way.image != nil {
		p.way.image(&im)
	}
	p.im = p.put(im)
	if p.way.pushed != nil {
		p.way.pushed(p)
	}
	return p
}

// put has the play's tag name what the client pulls.
func (p *play) put(im lab.Image) lab.Pushed {
	if p.c.image != nil {
		p.c.image(&im)
	}
	return p.reg.Push(p.repo+":"+p.tag, im)
}

func find[T any](all []T, name string, of func(T) string) T {
	if i := slices.IndexFunc(all, func(t T) bool { return of(t) == name }); i >= 0 {
		return all[i]
	}
	panic("no " + name)
}

// play plays a story at both sides and compares: at once, or in turn. It is alone
// when no other story is played meanwhile.
func (w *world) play(st story, alone, inTurn bool) *result {
	w.mu.Lock()
	w.stories++
	number := w.stories
	w.mu.Unlock()
	var both [2]*play
	var most atomic.Int64
	one := func(i int) {
		p := w.begin(st, i, number)
		p.most = &most
		both[i] = p
		w.mu.Lock()
		w.plays[p.repo] = p
		if alone {
			p.current = p
		}
		w.mu.Unlock()
		p.run()
		w.mu.Lock()
		delete(w.plays, p.repo)
		if alone {
			p.current = nil
		}
		w.mu.Unlock()
	}
	var sides sync.WaitGroup
	for i := range both {
		sides.Go(func() { one(i) })
		if inTurn || find(ways, st.way, func(w way) string { return w.name }).inTurn {
			sides.Wait()
		}
	}
	sides.Wait()
	r := compare(both[0], both[1])
	w.mu.Lock()
	w.results = append(w.results, r)
	w.mu.Unlock()
	return r
}

// run plays the story.
func (p *play) run() {
	m := find(moments, p.moment, func(m moment) string { return m.name })
	f := find(faults, p.fault, func(f fault) string { return f.name })
	if m.during != nil {
		p.Shape(8) // so that there is a middle
		defer p.Unshape()
	}
	if f.set != nil {
		mend := f.set(p)
		defer mend()
	}
	var after func()
	if m.before != nil && (p.agent != nil || m.both) {
		after = m.before(p)
	}
	var during sync.WaitGroup
	var came bool
	ended := make(chan struct{})
	if m.during != nil && (p.agent != nil || m.both) {
		during.Go(func() {
			select {
			case <-p.begun:
				came = true
				m.during(p)
			case <-ended: // the registry was asked for no blob
			}
		})
	}
	start := time.Now()
	do := find(ops, p.op, func(o op) string { return o.name })
	p.err = do.do(p)
	if p.err != nil && m.cuts {
		p.out = "" // what counts is the second answer
		p.err = do.do(p)
	}
	p.took = time.Since(start)
	close(ended)
	during.Wait()
	if m.after != nil && p.agent != nil && came {
		m.after(p)
	}
	if after != nil {
		after()
	}
	if p.c.forget != nil {
		p.c.forget(p)
	}
}

// own says whether a request is one that weir makes by itself, besides what the
// client asks: its HEADs and tokens in its own name, and the small ranges by which a
// registry shows that content is in a repository.
func own(q request) bool {
	var from, to int64
	n, _ := fmt.Sscanf(q.rng, "bytes=%d-%d", &from, &to)
	return q.agent == "weir" || q.method == http.MethodGet && n == 2 && to-from < 1<<10
}

// reads are requests that weir may spare the registry, and that clients make in
// numbers that depend on their own haste.
func reads(q request) bool {
	return q.method == http.MethodGet || q.method == http.MethodHead || q.path == "/token"
}

// compare says what is worse with weir.
func compare(without, with *play) *result {
	r := &result{story: without.story, took: [2]time.Duration{without.took, with.took}}
	for i, p := range []*play{without, with} {
		if p.err != nil {
			r.errs[i] = lastLines(normal(p.err.Error())) // they are sorted, without their times
		}
	}
	switch {
	case without.err == nil && with.err != nil:
		r.faults = append(r.faults, "it fails: "+r.errs[1])
	case without.err != nil && with.err != nil && !without.way.any && r.errs[0] != r.errs[1] && without.took-with.took < time.Minute:
		// Or the client has given up without weir, or was ended, before it came to what it says with it.
		r.faults = append(r.faults, fmt.Sprintf("another error: without %q, with %q", r.errs[0], r.errs[1]))
	case without.err == nil && with.err == nil && !sameAnswers(normal(without.out), normal(with.out)):
		r.faults = append(r.faults, fmt.Sprintf("another answer: without\n%s\nwith\n%s", normal(without.out), normal(with.out)))
	}
	cut := find(moments, without.moment, func(m moment) string { return m.name }).cuts // and clients try again
	if without.err == nil && with.err == nil && !cut && !without.way.any {
		r.faults = append(r.faults, asked(without, with)...)
	}
	for _, p := range []*play{without, with} {
		if len(r.faults) > 0 {
			r.faults = append(r.faults, fmt.Sprintf("asked with weir: %v:\n%s", p.agent != nil, p.whatWasAsked()))
		}
	}
	if len(r.faults) > 0 && with.agent != nil {
		r.faults = append(r.faults, "asked with weir: it has logged\n"+with.agent.Log(4<<10))
	}
	return r
}

// whatWasAsked is for whoever looks for the reason of a fault.
func (p *play) whatWasAsked() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []string
	for _, q := range p.asked {
		all = append(all, fmt.Sprintf("%v, by %s %s", q, q.agent, q.rng))
	}
	return strings.Join(all, "\n")
}

var digestHeaderRE = regexp.MustCompile(` Docker-Content-Digest=\["sha256:D"\]`)

// noRangeRE finds what an answer says beside that there is no such range.
var noRangeRE = regexp.MustCompile(`( → 416) .*`)

// sameAnswers compares what the raw client has printed. weir says a digest and a
// length too where the registry doesn't: it has verified them. That there is no such range it
// says in its own words, of what it has.
func sameAnswers(without, with string) bool {
	a, b := strings.Split(noRangeRE.ReplaceAllString(without, "$1"), "\n"), strings.Split(noRangeRE.ReplaceAllString(with, "$1"), "\n")
	return slices.EqualFunc(a, b, func(a, b string) bool {
		if n := lengthRE.FindStringSubmatch(b); n != nil && n[1] == n[2] && !strings.Contains(a, "Content-Length") {
			b = strings.Replace(b, fmt.Sprintf(" Content-Length=[%q]", n[1]), "", 1)
		}
		return a == b || a == digestHeaderRE.ReplaceAllString(b, "")
	})
}

// lengthRE finds the length that an answer says, and that of its body.
var lengthRE = regexp.MustCompile(`Content-Length=\["([0-9]+)"\].* ([0-9]+) bytes `)

// asked compares what the registry was asked.
func asked(without, with *play) (faults []string) {
	var n [2]map[string]int
	read := make(map[string]bool)
	for i, p := range []*play{without, with} {
		n[i] = make(map[string]int)
		p.mu.Lock()
		for _, q := range p.asked {
			if q.status == http.StatusUnauthorized || i == 1 && own(q) {
				continue
			}
			n[i][q.String()]++
			read[q.String()] = reads(q)
		}
		p.mu.Unlock()
	}
	for _, q := range slices.Sorted(maps.Keys(read)) {
		a, b := n[0][q], n[1][q]
		switch {
		case !read[q] && a != b:
			faults = append(faults, fmt.Sprintf("%s: %d times, without weir %d", q, b, a))
		case read[q] && b > 2*(a+explained(q, n[0]))+2, read[q] && b > 0 && a+explained(q, n[0]) == 0:
			faults = append(faults, fmt.Sprintf("%s: %d times, without weir %d", q, b, a))
		}
	}
	return faults
}

var progressRE = regexp.MustCompile(`^(T )?(Preparing|Uploading|Copying|Copied|Downloading|Downloaded|Exists|Skipped) |^time=T level=WARN msg="Failed to (copy|push) `)

func lastLines(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	// How far a client has come with what it does beside what fails depends on its haste.
	if told := slices.DeleteFunc(slices.Clone(lines), progressRE.MatchString); len(told) > 0 {
		lines = told
	}
	lines = lines[max(0, len(lines)-3):]
	slices.Sort(lines) // clients do several things at once
	return strings.Join(lines, "\n")
}

func TestTwins(t *testing.T) {
	w := newWorld(t)
	if *only != "" {
		sts, match := append(w.all(), fixed...), regexp.MustCompile(*only)
		if st, ok := w.parse(*only); ok {
			sts, match = []story{st}, regexp.MustCompile("")
		}
		for _, st := range sts {
			if match.MatchString(st.String()) {
				w.check(t, st, true)
			}
		}
		if len(w.results) == 0 {
			t.Errorf("no story has the name %q", *only)
		}
		w.report(t)
		return
	}
	byWay, others := w.fixed()
	var beside sync.WaitGroup
	for _, st := range slow {
		beside.Go(func() { w.check(t, st, false) })
	}
	for _, st := range byWay {
		w.check(t, st, true)
	}
	beside.Wait() // what comes now breaks connections
	for _, st := range others {
		w.check(t, st, true)
	}
	if *playFor > 0 {
		t.Logf("-twins.seed %d", *seed)
		rng := rand.New(rand.NewPCG(*seed, 0))
		var k, of int
		if n, err := fmt.Sscanf(*part, "%d/%d", &k, &of); n != 2 || err != nil || k < 1 || k > of {
			t.Fatalf("-twins.part %s", *part)
		}
		all, n, random := w.all(), 0, 0
		for i := k - 1; i < len(all); i += of {
			w.check(t, all[i], true)
			n++
		}
		for end := time.Now().Add(*playFor); time.Now().Before(end); random++ {
			w.check(t, w.random(rng), true)
		}
		w.composed = fmt.Sprintf("Of the %d stories of each client with each way, fault and moment it played %d, and %d random ones in %v.",
			len(all), n, random, *playFor)
	}
	w.report(t)
}

// check plays a story, whose being worse with weir fails the test.
func (w *world) check(t *testing.T, st story, alone bool) {
	r := w.play(st, alone, false)
	cuts := find(moments, st.moment, func(m moment) string { return m.name }).cuts
	better := r.errs[0] != "" && r.errs[1] == "" // it fails sooner than it succeeds
	if (*playFor > 0 || *only != "") && !cuts && !better && r.took[1]-r.took[0] > maxAdded {
		// Once more, as the machine has other things to do too, not least the other
		// side.
		if again := w.play(st, alone, true); again.took[1]-again.took[0] > maxAdded {
			r.faults = append(r.faults, fmt.Sprintf("%v, without weir %v; again: %v, %v", r.took[1], r.took[0], again.took[1], again.took[0]))
		}
	}
	if *playFor > 0 && r.errs[0] == "" && r.errs[1] != "" {
		w.again(r, alone)
	}
	for _, f := range r.faults {
		t.Errorf("%v: %.8000s", st, f)
	}
	if testing.Verbose() {
		fmt.Printf("%s %v: %v, %v %.120q\n", time.Now().Format("15:04:05"), st, r.took[0].Round(time.Millisecond), r.took[1].Round(time.Millisecond), r.errs)
	}
}

// again plays a story that has failed with weir alone some more times. It is no fault if its client
// fails in the same way without weir: it is luck then which of its requests comes first.
func (w *world) again(r *result, alone bool) {
	all := []*result{r}
	for range 5 {
		more := w.play(r.story, alone, true)
		all = append(all, more)
		if more.errs[0] == r.errs[1] {
			for _, r := range all {
				r.faults = nil
			}
			return
		}
	}
}

// report writes the table.
func (w *world) report(t *testing.T) {
	var b strings.Builder
	fmt.Fprintf(&b, "# Twins\n\nThe same stories on a node without weir and on one with it, as `make twins` played them: %d plays, seed %d.\n"+
		"%s\n"+"A story is a client, what it does, a way of the registry, a fault of the network and a moment in the agent's\nlife; each row sums up all that have it. "+
		"\"Worse\" are those that failed with weir alone, gave another answer or\nerror, or asked the registry for something else. Added time is with weir less without, of those that succeeded\nat both; negative is faster. Not counted as something else: weir's own HEADs and tokens (User-Agent weir), its\n"+
		"ranges of less than 1 KiB, what was answered with 401 (a warm pull of a public image needs no token, so that a client\nmay not have one yet for what follows), a HEAD in place of a GET of a tag, a whole blob in place of a range, and whatever was spared.\n"+
		"A story is played at both nodes at once. One that came more than a second later with weir was played again, in turn, and\n"+
		"counts if it did so both times; not where the agent is killed, and clients begin anew. One that failed with weir alone\n"+
		"was played five times more, and counts unless it failed in the same way without weir.\n",
		len(w.results), *seed, w.composed)
	for _, dim := range []struct {
		name string
		of   func(story) string
	}{
		{"client", func(s story) string { return s.client }}, {"what it does", func(s story) string { return s.op }},
		{"way of the registry", func(s story) string { return s.way }}, {"fault of the network", func(s story) string { return s.fault }},
		{"moment in the agent's life", func(s story) string { return s.moment }},
	} {
		fmt.Fprintf(&b, "\n| %s | plays | succeeded at both | failed at both | failed without weir alone | worse with weir | added, p50 | added, worst |\n|---|---|---|---|---|---|---|---|\n", dim.name)
		rows := make(map[string][]*result)
		for _, r := range w.results {
			rows[dim.of(r.story)] = append(rows[dim.of(r.story)], r)
		}
		for _, name := range slices.Sorted(maps.Keys(rows)) {
			var ok, failed, better, worse int
			var added []time.Duration
			for _, r := range rows[name] {
				switch {
				case len(r.faults) > 0:
					worse++
				case r.errs[0] != "" && r.errs[1] == "":
					better++
				case r.errs[0] != "":
					failed++
				default:
					ok++
				}
				if r.errs == [2]string{} {
					added = append(added, r.took[1]-r.took[0])
				}
			}
			p50, worst := "–", "–"
			if len(added) > 0 {
				slices.Sort(added)
				p50, worst = fmt.Sprint(added[len(added)/2].Milliseconds(), " ms"), fmt.Sprint(added[len(added)-1].Milliseconds(), " ms")
			}
			fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %s | %s |\n", cmp.Or(name, "none"), len(rows[name]), ok, failed, better, worse, p50, worst)
		}
	}
	b.WriteString("\n## Worse with weir\n\n")
	n := 0
	for _, r := range w.results {
		for _, f := range r.faults {
			if !strings.HasPrefix(f, "asked with weir") {
				n++
				fmt.Fprintf(&b, "- %v: %s\n", r.story, strings.ReplaceAll(f, "\n", " "))
			}
		}
	}
	if n == 0 {
		b.WriteString("None.\n")
	}
	if *out == "" {
		t.Log(b.String())
	} else if err := os.WriteFile(*out, []byte(b.String()), 0o644); err != nil {
		t.Error(err)
	}
}
