// SPDX-License-Identifier: Apache-2.0

package rights

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// clocked is a memory whose clock a test sets.
func clocked() (r *Rights, later func(time.Duration)) {
	now := time.Now()
	return New(Options{GrantTTL: 5 * time.Minute, StaleIfError: time.Hour, Now: func() time.Time { return now }}), func(d time.Duration) { now = now.Add(d) }
}

// Whatever a client shows of itself makes it another one, and what says nothing of
// it doesn't.
func TestClient(t *testing.T) {
	r := New(Options{})
	type client struct {
		identity, network string
		header            http.Header
	}
	seen := make(map[Client]string)
	for name, c := range map[string]client{
		"nothing":                  {},
		"a certificate":            {identity: "cert"},
		"a network":                {network: "cert"},
		"a network of the token":   {network: "Bearer a"},
		"a token":                  {header: http.Header{"Authorization": {"Bearer a"}}},
		"another token":            {header: http.Header{"Authorization": {"Bearer b"}}},
		"two tokens":               {header: http.Header{"Authorization": {"Bearer a", "Bearer b"}}},
		"in the other order":       {header: http.Header{"Authorization": {"Bearer b", "Bearer a"}}},
		"two in one field":         {header: http.Header{"Authorization": {"Bearer a=Bearer b"}}},
		"an empty field more":      {header: http.Header{"Authorization": {"Bearer a", ""}}},
		"both and a certificate":   {identity: "cert", header: http.Header{"Authorization": {"Bearer a"}}},
		"a cookie":                 {header: http.Header{"Cookie": {"Bearer a"}}},
		"a token and a cookie":     {header: http.Header{"Authorization": {"Bearer a"}, "Cookie": {"Bearer a"}}},
		"a certificate like it":    {identity: "Bearer a"},
		"Artifactory's key":        {header: http.Header{"X-Jfrog-Art-Api": {"Bearer a"}}},
		"GitLab's token":           {header: http.Header{"Private-Token": {"Bearer a"}}},
		"Cloudflare Access":        {header: http.Header{"Cf-Access-Client-Secret": {"Bearer a"}}},
		"an identity token":        {header: http.Header{"X-Registry-Auth": {"Bearer a"}}},
		"an unknown field":         {header: http.Header{"X-A": {"1"}}},
		"one with another value":   {header: http.Header{"X-A": {"2"}}},
		"a field that isn't valid": {header: http.Header{"x a": {"1"}}},
		"an address by a proxy":    {header: http.Header{"X-Forwarded-For": {"10.0.0.1"}}},
		"a program":                {header: http.Header{"User-Agent": {"docker/29"}}},
	} {
		who := r.Client(c.header, c.identity, c.network)
		if other, ok := seen[who]; ok {
			t.Errorf("%s is taken for %s", name, other)
		}
		seen[who] = name
		if anonymous := Anonymous(c.header); anonymous != (len(c.header) == 0 || name == "a program") {
			t.Errorf("%s: anonymous %v", name, anonymous)
		}
		more := c.header.Clone()
		if more == nil {
			more = make(http.Header)
		}
		for field := range noCredential {
			more.Set(field, "anything")
		}
		if r.Client(more, c.identity, c.network) != who || Anonymous(more) != Anonymous(c.header) {
			t.Errorf("%s is another client with %v", name, more)
		}
		if left := Strip(more); len(left) != len(noCredential) {
			t.Errorf("%s: %v was left", name, left)
		}
	}
	if New(Options{}).Client(nil, "", "") == r.Client(nil, "", "") {
		t.Error("the hash means the same elsewhere")
	}
}

// Who was told that content isn't there isn't given it, before it is proven anew.
func TestDenials(t *testing.T) {
	r, later := clocked()
	repo := Repository{Registry: "r", Name: "a"}
	p, q := Principal{repo, Client{1}}, Principal{repo, Client{2}}
	d, other := digest.FromString("x"), digest.FromString("y")
	r.Deny(p, "", d, r.Now()) // it isn't known that it ever was there
	later(time.Second)
	for _, d := range []digest.Digest{d, other} {
		r.Prove(Vantage{Repository: repo}, d, r.Now())
	}
	r.Grant(p, r.Now())
	r.Grant(q, r.Now())
	allowed := func(p Principal, d digest.Digest, want bool) {
		t.Helper()
		if r.Allows(p, "", d) != want || r.AllowsStale(p, "", d) != want {
			t.Errorf("allowed: %v, while the registry is silent %v, want %v", r.Allows(p, "", d), r.AllowsStale(p, "", d), want)
		}
	}
	allowed(p, d, true)
	later(time.Second)
	r.Deny(p, "", d, r.Now())
	allowed(p, d, false)
	allowed(p, other, true)
	allowed(q, d, true)
	later(time.Second)
	r.Prove(Vantage{Repository: repo}, d, r.Now())
	allowed(p, d, true)
}

func TestGrants(t *testing.T) {
	r, later := clocked()
	repo, other := Repository{Registry: "r", Name: "a"}, Repository{Registry: "r", Name: "b"}
	p := Principal{repo, Client{1}}
	d := digest.FromString("x")
	r.Grant(p, r.Now())
	if r.Allows(p, "", d) {
		t.Error("a grant says that anything is in the repository")
	}
	r.Prove(Vantage{Repository: repo}, d, r.Now())
	for _, q := range []Principal{{repo, Client{2}}, {other, Client{1}}, {Repository{Registry: "r", Name: "a", Network: "network x"}, Client{1}}} {
		if r.Allows(q, "", d) {
			t.Errorf("%v has the grant too", q)
		}
	}
	if !r.Allows(p, "", d) || r.Allows(p, "", digest.FromString("y")) {
		t.Error("what is granted and proven isn't what is allowed")
	}
	r.Refuse(p)
	if r.Allows(p, "", d) || !r.Contains(Vantage{Repository: repo}, d) {
		t.Error("a refusal is no refusal, or takes more than the grant")
	}
	r.Grant(p, r.Now())
	later(5*time.Minute - time.Second)
	if !r.Allows(p, "", d) {
		t.Error("the grant is over too early")
	}
	later(time.Second)
	if r.Allows(p, "", d) {
		t.Error("the grant isn't over")
	}
	later(24 * time.Hour)
	r.Grant(p, r.Now())
	if r.Allows(p, "", d) {
		t.Error("the content is in the repository for good")
	}
}

// Grants that are over take no place: each pull comes with a new token.
func TestGrantsExpire(t *testing.T) {
	r, later := clocked()
	repo := Repository{Registry: "r", Name: "a"}
	for i := range 5 {
		r.Grant(Principal{repo, Client{byte(i)}}, r.Now())
	}
	later(5*time.Minute - time.Second)
	r.Grant(Principal{repo, Client{0}}, r.Now())
	r.Grant(Principal{repo, Client{9}}, r.Now())
	if n := r.grants.size(); n != 6 {
		t.Errorf("%d are remembered", n)
	}
	later(2 * time.Second)
	r.Grant(Principal{repo, Client{10}}, r.Now())
	if n := r.grants.size(); n != 3 {
		t.Errorf("%d are remembered after the time of a grant", n)
	}
}

func TestPublic(t *testing.T) {
	r, later := clocked()
	repo := Repository{Registry: "r", Name: "a"}
	v, elsewhere := Vantage{repo, "here"}, Vantage{repo, "there"}
	d := digest.FromString("x")
	p := Principal{repo, Client{1}}
	r.Prove(Vantage{Repository: repo}, d, r.Now())
	if r.AllowsStale(p, "here", d) || r.NeedsCheck(v, true) {
		t.Error("public before anything was asked")
	}
	if !r.NeedsCheck(v, false) || r.NeedsCheck(v, false) || !r.NeedsCheck(elsewhere, false) {
		t.Error("it is asked never, or twice")
	}
	r.SetPublic(v, true, "1", false)
	if !r.AllowsStale(p, "here", d) || r.AllowsStale(p, "there", d) || r.Allows(p, "", d) || r.AllowsStale(p, "here", digest.FromString("y")) {
		t.Error("what is public isn't what is allowed in an outage")
	}
	if r.NeedsCheck(v, true) {
		t.Error("a refusal has it asked at once")
	}
	later(time.Minute)
	if !r.NeedsCheck(v, true) || r.NeedsCheck(v, true) || r.Reference(v) != "1" || !r.Public(v) {
		t.Error("a refusal has it asked never, or twice, or changes something by itself")
	}
	r.SetPublic(v, false, "1", false)
	if r.AllowsStale(p, "here", d) {
		t.Error("it is public after all")
	}
	r.Grant(p, r.Now())
	if !r.AllowsStale(p, "here", d) {
		t.Error("a grant doesn't count in an outage")
	}
	r.SetPublic(v, true, "1", false)
	later(time.Hour)
	if r.AllowsStale(p, "here", d) {
		t.Error("it is public for good")
	}
}

func TestTags(t *testing.T) {
	r, later := clocked()
	repo := Repository{Registry: "r", Name: "a"}
	ds := []digest.Digest{digest.FromString("0"), digest.FromString("1"), digest.FromString("2"), digest.FromString("3"), digest.FromString("4")}
	for _, d := range ds {
		r.SetTag(repo, "1", Tagged{Digest: d, When: r.Now()})
		later(time.Second)
	}
	r.SetTag(repo, "1", Tagged{Digest: ds[2], When: r.Now()})
	r.SetTag(repo, "2", Tagged{Digest: ds[2], When: r.Now()})
	var got []digest.Digest
	for _, was := range r.Tag(repo, "1") {
		got = append(got, was.Digest)
	}
	if want := []digest.Digest{ds[2], ds[4], ds[3], ds[1]}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", got, want)
	}
	r.ForgetTag(repo, ds[2].String())
	if len(r.Tag(repo, "1")) != 3 || len(r.Tag(repo, "2")) != 0 {
		t.Errorf("%v %v", r.Tag(repo, "1"), r.Tag(repo, "2"))
	}
	if !r.HasStale(repo) || r.HasStale(Repository{Registry: "q"}) {
		t.Error("what there is to serve")
	}
	r.ForgetTag(repo, "1")
	if len(r.Tag(repo, "1")) != 0 {
		t.Error("not forgotten")
	}
}

// HEAD and GET of a tag may be answered with different digests, and clients that
// accept different media types.
func TestTagsThatDiffer(t *testing.T) {
	r, later := clocked()
	repo := Repository{Registry: "r", Name: "a"}
	index, manifest, moved := digest.FromString("index"), digest.FromString("manifest"), digest.FromString("moved")
	now := func() Tagged { return r.Tag(repo, "1")[0] }
	say := func(d digest.Digest, read bool, without uint8) {
		r.SetTag(repo, "1", Tagged{Digest: d, When: r.Now(), Read: read, Without: without})
	}
	say(manifest, false, 0)
	say(index, true, 0)
	if got := now(); got.Digest != index || !got.Read || !got.Differs || len(r.Tag(repo, "1")) != 1 {
		t.Errorf("after HEAD and GET: %+v", r.Tag(repo, "1"))
	}
	if say(index, false, 0); !now().Read || now().Differs {
		t.Errorf("HEAD has agreed: %+v", now())
	}
	later(time.Minute)
	if say(moved, false, 0); now().Digest != moved || now().Read {
		t.Errorf("HEAD says that it has moved: %+v", now())
	}
	later(time.Minute)
	if say(index, true, 0); now().Differs {
		t.Errorf("it has moved back: %+v", now())
	}
	if say(manifest, true, 1); now().Without != 1 || len(r.Tag(repo, "1")) != 2 || now().Differs {
		t.Errorf("to a client that accepts less: %+v", r.Tag(repo, "1"))
	}
}

// Neither a registry nor a network can wash out what is known of others.
func TestSharesAreFair(t *testing.T) {
	r, _ := clocked()
	d := digest.FromString("x")
	victim := Repository{Registry: "docker.io", Name: "library/debian"}
	pod := Repository{Registry: "http://a@10.0.0.1:5000#pod", Name: "a", Network: UnauthenticatedNetwork("pod")}
	for _, repo := range []Repository{victim, pod} {
		r.SetTag(repo, "12", Tagged{Digest: d, When: r.Now()})
		r.Prove(Vantage{Repository: repo}, d, r.Now())
		r.Grant(Principal{repo, Client{1}}, r.Now())
		r.SetPublic(Vantage{Repository: repo}, true, "12", false)
	}
	// One network with many registries, and one registry with a good certificate.
	for i := range 2 * maxContent {
		for _, repo := range []Repository{
			{Registry: fmt.Sprintf("http://r@10.0.0.1:%d#evil", i), Name: "a", Network: UnauthenticatedNetwork("evil")},
			{Registry: "evil.example", Name: fmt.Sprint("a", i)},
		} {
			e := digest.FromString(fmt.Sprint(i))
			r.Prove(Vantage{Repository: repo}, e, r.Now())
			if i < 2*maxTags {
				r.SetTag(repo, "1", Tagged{Digest: e, When: r.Now()})
				r.Grant(Principal{repo, Client{byte(i), byte(i >> 8), byte(i >> 16)}}, r.Now())
				r.SetPublic(Vantage{Repository: repo}, true, "1", false)
			}
		}
	}
	for _, repo := range []Repository{victim, pod} {
		if len(r.Tag(repo, "12")) != 1 || !r.Allows(Principal{repo, Client{1}}, "", d) || !r.Public(Vantage{Repository: repo}) {
			t.Errorf("what was known of %v is washed out", repo)
		}
	}
	if r.content.size() > maxContent || r.tags.size() > maxTags || r.grants.size() > maxGrants || r.public.size() > maxPublic {
		t.Error("the tables aren't bounded")
	}
}

// A table with as many shares as entries.
func TestSharesOfOne(t *testing.T) {
	s := newShares[int, int](4)
	for i := range 100 {
		s.put(fmt.Sprint(i), i, i)
		if v, ok := s.get(fmt.Sprint(i), i); !ok || v != i || s.size() > 4 {
			t.Fatalf("%d: %v %v, of %d", i, v, ok, s.size())
		}
	}
	if len(s.names()) != 4 {
		t.Errorf("%v", s.names())
	}
	for i := range 100 {
		s.remove(fmt.Sprint(i), i)
	}
	if s.size() != 0 || len(s.names()) != 0 {
		t.Errorf("%d in %v", s.size(), s.names())
	}
}

// What is known outlives the process, but for what is of a pod's network.
func TestSave(t *testing.T) {
	r, _ := clocked()
	d := digest.FromString("x")
	repos := []Repository{
		{Registry: "r", Name: "a"},
		{Registry: "http://r@10.0.0.1:5000", Name: "a", Network: UnauthenticatedNetwork("")},
		{Registry: "http://r@10.0.0.1:5000#pod", Name: "a", Network: UnauthenticatedNetwork("pod")},
	}
	for _, repo := range repos {
		for _, x := range []string{"old", "new"} {
			r.SetTag(repo, "1", Tagged{Digest: digest.FromString(x), When: r.Now()})
		}
		r.Prove(Vantage{Repository: repo}, d, r.Now())
		r.SetPublic(Vantage{repo, "here"}, true, "1", false)
		r.Grant(Principal{repo, Client{1}}, r.Now())
	}
	file := filepath.Join(t.TempDir(), "tags.json")
	if err := r.Save(file); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+"123"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	again, _ := clocked()
	if err := again.Load(file); err != nil {
		t.Fatal(err)
	}
	for i, repo := range repos {
		lasts := i < 2
		if tags := again.Tag(repo, "1"); len(tags) != map[bool]int{true: 2, false: 0}[lasts] || lasts && tags[0].Digest != digest.FromString("new") {
			t.Errorf("%v: %v", repo, tags)
		}
		v := Vantage{repo, "here"}
		if again.Contains(Vantage{Repository: repo}, d) != lasts || again.Public(v) != lasts || lasts && again.Reference(v) != "1" || again.Granted(Principal{repo, Client{1}}) {
			t.Errorf("%v is remembered otherwise", repo)
		}
	}
	if len(again.Repositories()) != 2 {
		t.Error(again.Repositories())
	}
	if left, _ := os.ReadDir(filepath.Dir(file)); len(left) > 1 {
		t.Error(left)
	}
	// Nothing has changed, and nothing is written.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := r.Save(file); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("written again")
	}
}

// Of what version 0.1.0 has written only the tags count: it took what registries
// claimed for what they have, and clients with credentials that it didn't know for
// anonymous ones.
func TestLoadOld(t *testing.T) {
	r, _ := clocked()
	d := digest.FromString("x")
	old := fmt.Sprintf(`{"tags":[{"Registry":"r","Repository":"a","Tag":"1","Digest":%q,"When":%q}],
		"public":[{"Registry":"r","Repository":"a","When":%[2]q}],"members":{"r":{"a":{%[1]q:%[2]q}}}}`, d, r.Now().Format(time.RFC3339))
	file := filepath.Join(t.TempDir(), "tags.json")
	if err := os.WriteFile(file, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Load(file); err != nil {
		t.Fatal(err)
	}
	repo := Repository{Registry: "r", Name: "a"}
	if len(r.Tag(repo, "1")) != 1 || r.Contains(Vantage{Repository: repo}, d) || r.Public(Vantage{Repository: repo}) {
		t.Error(r.Tag(repo, "1"))
	}
}

// What a peer knows is bytes from outside, and counts in an outage only.
func TestMergeOnlyTheRepository(t *testing.T) {
	r, _ := clocked()
	repo, other := Repository{Registry: "r.example", Name: "a"}, Repository{Registry: "r.example", Name: "b"}
	d := digest.FromString("x")
	now := r.Now()
	r.Merge(Memory{Repositories: []Known{
		{Registry: "r.example", Name: "b", Tags: map[string][]Tagged{"1": {{Digest: d, When: now}}}, Content: map[digest.Digest]time.Time{d: now}},
		{Registry: "r.example", Name: "a", Content: map[digest.Digest]time.Time{d: now, "nonsense": now}, Public: map[string]Confirmed{"": {now, "1", false}},
			Tags: map[string][]Tagged{"bad": {{Digest: "nonsense", When: now}}, "future": {{Digest: d, When: now.Add(time.Hour)}}, "old": {{Digest: d, When: now.Add(-2 * time.Hour)}}, "good": {{Digest: d, When: now}}}},
	}, Tags: []oldTag{{"r.example", "a", "other", d, now}}}, repo)
	for name, want := range map[string]int{"bad": 0, "future": 0, "old": 0, "good": 1, "other": 0} {
		if got := r.Tag(repo, name); len(got) != want {
			t.Errorf("tag %s: %v", name, got)
		}
	}
	p := Principal{repo, Client{1}}
	r.Grant(p, r.Now())
	r.Grant(Principal{other, Client{1}}, r.Now())
	if len(r.Tag(other, "1")) > 0 || r.AllowsStale(Principal{other, Client{1}}, "", d) || r.Public(Vantage{Repository: repo}) ||
		!r.AllowsStale(p, "", d) || r.Allows(p, "", d) || r.AllowsStale(p, "", "nonsense") {
		t.Error("something else was merged")
	}
}

// FuzzLoad reads a file that somebody or something has damaged.
func FuzzLoad(f *testing.F) {
	d := digest.FromString("x")
	whole, _ := json.Marshal(Memory{Version: 1, Tags: []oldTag{{"r", "a/b", "1", d, time.Unix(1, 0)}}, Repositories: []Known{{Registry: "r", Name: "a/b",
		Tags: map[string][]Tagged{"1": {{Digest: d, When: time.Now()}}}, Content: map[digest.Digest]time.Time{d: time.Now()}, Public: map[string]Confirmed{"": {time.Now(), "1", false}}}}})
	f.Add(whole)
	f.Add(whole[:len(whole)-9])
	f.Add([]byte(`{"repositories":[{"registry":"","tags":{"":[{"Digest":"sha256:1","When":"9999-12-31T23:59:59Z"}]},"content":{"":"0001-01-01T00:00:00Z"}}]}`))
	file := filepath.Join(f.TempDir(), "tags.json")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		r := New(Options{StaleIfError: time.Hour})
		if r.Load(file) != nil {
			return
		}
		check(t, r.export("", func(Repository) bool { return true }), nil)
	})
}

// FuzzMerge merges what a peer says of a repository.
func FuzzMerge(f *testing.F) {
	d := digest.FromString("x")
	say := func(k Known) {
		b, _ := json.Marshal(Memory{Repositories: []Known{k}})
		f.Add(b)
	}
	content := map[digest.Digest]time.Time{d: time.Now()}
	say(Known{Registry: "r", Name: "a/b", Tags: map[string][]Tagged{"1": {{Digest: d, When: time.Now()}}}, Content: content})
	say(Known{Registry: "r", Name: "else", Tags: map[string][]Tagged{"1": {{Digest: d, When: time.Now()}}}, Content: content})
	say(Known{Registry: "r", Name: "a/b", Tags: map[string][]Tagged{"1": {{Digest: d, When: time.Now().Add(24 * 365 * time.Hour)}}}, Public: map[string]Confirmed{"": {time.Now(), "1", false}}})
	repo := Repository{Registry: "r", Name: "a/b"}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m Memory
		if json.Unmarshal(b, &m) != nil {
			return
		}
		r := New(Options{StaleIfError: time.Hour})
		r.Merge(m, repo)
		check(t, r.export("", func(Repository) bool { return true }), &repo)
		if r.content.size() > 0 || r.public.size() > 0 {
			t.Error("a peer proves something")
		}
	})
}

// check checks what is known: of one repository alone, if it isn't nil.
func check(t *testing.T, m Memory, repo *Repository) {
	t.Helper()
	for _, k := range m.Repositories {
		if repo != nil && (Repository{k.Registry, k.Name, k.Network}) != *repo {
			t.Errorf("of another repository: %+v", k)
		}
		for name, all := range k.Tags {
			for _, was := range all {
				if was.Digest.Validate() != nil || repo != nil && time.Until(was.When) > 2*time.Minute {
					t.Errorf("the tag %s %+v", name, was)
				}
			}
			if len(all) > maxTagged {
				t.Errorf("%d of a tag", len(all))
			}
		}
		for d := range k.Content {
			if d.Validate() != nil {
				t.Errorf("the content %q", d)
			}
		}
	}
	if _, err := json.Marshal(m); err != nil {
		t.Errorf("what was read can't be written: %v", err)
	}
}

// size is how many entries there are.
func (s *shares[K, V]) size() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

// The clock was a month ahead, and is right again: what is recorded from then on
// counts, and not what is said to be of then.
func TestClockWasAhead(t *testing.T) {
	r, pass := clocked()
	repo := Repository{Registry: "r.example", Name: "a"}
	p := Principal{Repository: repo, Client: Client{1}}
	d := digest.FromString("a")
	pull := func() {
		r.Grant(p, r.Now())
		r.SetTag(repo, "1", Tagged{Digest: d, When: r.Now()})
		r.SetPublic(Vantage{Repository: repo}, true, "1", false)
	}
	pass(30 * 24 * time.Hour)
	pull()
	pass(-30 * 24 * time.Hour)
	if r.Granted(p) || r.HasStale(repo) || r.Public(Vantage{Repository: repo}) {
		t.Error("what is yet to come counts")
	}
	pull()
	if !r.Granted(p) || !r.HasStale(repo) || !r.Public(Vantage{Repository: repo}) {
		t.Errorf("granted %v, stale %v, public %v", r.Granted(p), r.HasStale(repo), r.Public(Vantage{Repository: repo}))
	}
	r.ForgetTag(repo, "1")
	if r.HasStale(repo) {
		t.Error("its only tag was forgotten")
	}
}
