// SPDX-License-Identifier: Apache-2.0

package registry

// The oracle asks of each answer of weir: would the registry have given this to
// this very request?
//
// Stories are played: registries grant, refuse, redirect, fail, revoke and lie,
// and clients send requests of every form, as raw bytes, with credentials of
// every form. Each request is also answered by the model of the registry itself,
// with redirects followed as a client does. Two answers are compared.
//   - The kind "security": weir gave content, or its size, or whether it is
//     there, that the registry gives neither to this request nor by an exception.
//   - The kind "difference": weir gave another status or other bytes than the
//     registry, and no exception allows it.
//   - The kind "corrupt": the whole of a content came with other bytes than its
//     digest's, whatever the registry sent. What weir doesn't understand, and
//     ranges, it passes on without a look.
//   - The kind "hang": weir gave no answer, or its background does not end.
//
// The exceptions are these. What they need to know of the past is in a ledger
// that is filled from what registries sent to weir, never from weir's state.
//   - "a part": weir may answer a range or a condition by itself, of what the
//     registry gives to the same request without it. Where
//     the registry's body breaks off, weir's may, or its answer ("it broke off").
//   - "without a range": what the registry answers to the request without it.
//   - "without userinfo": weir need not send on the userinfo of an absolute
//     form, so that the registry's answer may be the one without.
//   - "redirected": of several redirects weir may have followed the first ones.
//   - "anonymous": a request without any credentials may be answered with what
//     the registry gives with an anonymous token.
//   - "wrong bytes": where the registry sends bytes of another digest than was
//     asked for, weir may break off or answer 404 or 502, and may not complete them. What it
//     has sent before of a range counts as well.
//   - "remembered": the registry gave content of this repository, or said that it
//     is there, to the same client (all fields but the harmless ones, query,
//     userinfo, certificate and network), or to weir's own request for one without
//     credentials, within the last DefaultRightsTTL, and
//     has not refused it since; and within the last 24 hours it sent the bytes
//     of this content in this repository, to any client, directly or through a
//     redirect, or accepted them in a push; and it has not said to this client
//     since that this content isn't there. A tag has to be what the registry
//     answers now, to GET or to HEAD.
//   - "stale": while the registry gives no answer (an error, 429, 5xx, a page of
//     HTML), the client has such a right, or the repository was given to an
//     anonymous request within the last DefaultStaleIfError, from the same
//     network where the registry knows clients by their network; and the bytes
//     came from there as above.
//     The same holds for one without credentials while the token server fails.
//   - "base while the registry is silent": GET /v2/ may be answered with 200, and
//     a request without credentials with the registry's 401.
//   - "the token server's failure": while it fails, a request without credentials may
//     be answered with that.
//   - "with an anonymous token": who sends what weir gives out in a token server's
//     stead is one without credentials, in all of this, and may be answered as if it
//     had an anonymous token. It is given out ("a token") for pulling from
//     repositories that an anonymous request was given, and nothing else.
//
// A HEAD, a redirect, a manifest that lists a layer, a mount, a page of HTML, a
// range of other bytes and a digest in a field prove nothing, whoever says so.
//
// What came through a redirect counts for the repository, though the host that
// sent it may have looked at the client: the oracle allows what follows from that
// (weir counts it for the client's network, which has tests of its own).
//
// It does not look at response fields but Content-Length, Content-Range and
// Location, at how long an answer takes, nor at peers and the mirror.

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

var (
	oracleSeed  = flag.Uint64("oracle.seed", 1, "the seed of the oracle's stories")
	oracleSteps = flag.Int("oracle.steps", 20_000, "how many steps the oracle's stories have in all")
	oracleKinds = flag.String("oracle.kinds", strings.Join(storyKinds, ","), "of which kinds the oracle's stories are")
)

// storySteps is how many steps a story has after its beginning.
const storySteps = 60

// storyDir is an empty directory for a story, where there is no disk if possible.
func storyDir(t *testing.T) string {
	if dir, err := os.MkdirTemp("/dev/shm", "weir-oracle-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	return t.TempDir()
}

// TestOracleCorpus plays the stories that were found once.
func TestOracleCorpus(t *testing.T) {
	files, err := filepath.Glob("testdata/oracle/*.story")
	if err != nil || len(files) == 0 {
		t.Fatal("no stories: ", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".story"), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			lines := parseStory(b)
			f, at, err := tell(storyDir(t), lines, make(map[string]int))
			if err != nil {
				t.Fatal(err)
			}
			if f != nil {
				t.Errorf("step %d, %s\n%s: %s", at+1, lines[at], f.kind, f.text)
			}
		})
	}
}

// TestOracle plays random stories.
func TestOracle(t *testing.T) {
	kinds := strings.Split(*oracleKinds, ",")
	counts := make(map[string]map[string]int)
	for _, kind := range kinds {
		counts[kind] = make(map[string]int)
	}
	var mu sync.Mutex
	var next, faults atomic.Int64
	var wg sync.WaitGroup
	stories := (*oracleSteps + storySteps - 1) / storySteps
	dir := storyDir(t)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for faults.Load() < 5 {
				n := int(next.Add(1)) - 1
				if n >= stories {
					return
				}
				kind, mine := kinds[n%len(kinds)], make(map[string]int)
				if !oracleStory(t, dir, n, kind, mine) {
					faults.Add(1)
				}
				mu.Lock()
				for k, v := range mine {
					counts[kind][k] += v
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for _, kind := range kinds {
		var all []string
		for _, k := range slices.Sorted(maps.Keys(counts[kind])) {
			all = append(all, fmt.Sprintf("%s %d", k, counts[kind][k]))
		}
		t.Logf("%s: %s", kind, strings.Join(all, ", "))
	}
	if faults.Load() > 0 || *oracleSteps < 10_000 {
		return
	}
	// What is never served can't be served wrongly.
	for _, kind := range kinds {
		need := []string{"from store", "from stored", "from forwarded", "from refused"}
		switch kind {
		case "plain", "credentials":
			need = append(need, "because remembered")
		case "outages":
			need = append(need, "because stale", "because wrong bytes")
		case "hostile":
			need = append(need, "because wrong bytes")
		case "arriving":
			need = append(need, "from transfer")
		case "everything":
			need = append(need, "because stale", "from transfer")
		}
		for _, k := range need {
			if counts[kind][k] == 0 {
				t.Errorf("in stories of the kind %q no answer was %q", kind, k)
			}
		}
	}
}

// oracleStory plays one story, and says what is wrong in it.
func oracleStory(t *testing.T, root string, n int, kind string, counts map[string]int) (ok bool) {
	play := func(lines []string, counts map[string]int) (*fault, int, error) {
		dir, err := os.MkdirTemp(root, "story-")
		if err != nil {
			return nil, 0, err
		}
		defer os.RemoveAll(dir)
		return tell(dir, lines, counts)
	}
	a := &author{Rand: rand.New(rand.NewPCG(*oracleSeed, uint64(n))), kind: kind}
	lines := a.write(storySteps)
	f, at, err := play(lines, counts)
	if err != nil {
		t.Errorf("story %d: %v", n, err)
		return false
	}
	if f == nil {
		return true
	}
	if f.kind != "hang" {
		lines = shorten(lines[:at+1], func(l []string) bool {
			g, _, err := play(l, make(map[string]int))
			return err == nil && g != nil && g.kind == f.kind
		})
		if g, _, err := play(lines, make(map[string]int)); err == nil && g != nil {
			f = g
		}
	}
	t.Errorf("-oracle.seed %d, story %d of %s, step %d\n%s: %s\nthe story, as short as it gets:\n%s", *oracleSeed, n, kind, at+1, f.kind, f.text, strings.Join(lines, "\n"))
	return false
}
