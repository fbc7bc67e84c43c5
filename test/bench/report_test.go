// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// section is a part of RESULTS.md: what one benchmark has measured.
type section struct {
	title string
	text  string // what was done, and how to read it
	head  []string
	rows  [][]string
	plots []plot
}

func (s *section) row(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		row[i] = fmt.Sprint(c)
	}
	s.rows = append(s.rows, row)
}

// order is that of the sections in the file.
var order = []string{pullsTitle, blobsTitle, requestsTitle, peersTitle, blobFromPeerTitle, fromPeerTitle, passTitle, connectTitle, coldTitle, boundedTitle, chunksTitle, mirrorsTitle,
	agentTitle, storeGrowthTitle, connectionsTitle, namespacesTitle}

// report logs a section, and puts it into RESULTS.md in the directory of
// -results, in the place of an earlier one.
func (s *section) report(b *testing.B) {
	b.Helper()
	var t strings.Builder
	fmt.Fprintf(&t, "## %s\n\n%s\n\n| %s |\n|%s\n", s.title, s.text, strings.Join(s.head, " | "), strings.Repeat("---|", len(s.head)))
	for _, r := range s.rows {
		fmt.Fprintf(&t, "| %s |\n", strings.Join(r, " | "))
	}
	for _, p := range s.plots {
		fmt.Fprintf(&t, "\n![%s](%s)\n", p.title, p.file)
	}
	fmt.Fprintf(&t, "\nMeasured until %s by `make bench BENCH=%s`, weir %s.%s\n", time.Now().UTC().Format("2006-01-02 15:04 UTC"), strings.TrimPrefix(b.Name(), "Benchmark"), revision(), company)
	fmt.Println("\n" + t.String())
	if *results == "" {
		return
	}
	for _, p := range s.plots {
		if err := os.WriteFile(filepath.Join(*results, p.file), []byte(p.svg()), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	path := filepath.Join(*results, "RESULTS.md")
	old, _ := os.ReadFile(path)
	parts := make(map[string]string)
	for _, part := range strings.Split("\n"+string(old), "\n## ")[1:] {
		title, _, _ := strings.Cut(part, "\n")
		parts[title] = "## " + strings.TrimSpace(part) + "\n"
	}
	parts[s.title] = t.String()
	out := header()
	for _, title := range order {
		if part, ok := parts[title]; ok {
			out += "\n" + part
		}
	}
	if err := os.WriteFile(path, []byte(out), 0o644); err != nil {
		b.Fatal(err)
	}
}

// company says what else the machine did when the measurements began.
var company = func() string {
	var load float64
	if raw, err := os.ReadFile("/proc/loadavg"); err == nil {
		fmt.Sscan(string(raw), &load)
	}
	if load < float64(runtime.NumCPU()) {
		return ""
	}
	return fmt.Sprintf(" The machine was **not** alone with it: its load was %.0f before.", load)
}()

// header says on what the figures were measured.
func header() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	cpu := "unknown"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, ok := strings.CutPrefix(line, "model name"); ok {
				cpu = strings.TrimSpace(strings.TrimLeft(name, " \t:"))
				break
			}
		}
	}
	first := func(name string, args ...string) string {
		out, _ := exec.Command(name, args...).CombinedOutput()
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return line
	}
	return fmt.Sprintf(`# What weir costs, and what it gains

Made by %s, which writes this file; the parts can be measured again one by one. Everything runs on one
machine: clients, weir, what it is compared with, and the registries share its processors unless a part
says otherwise. What is compared is measured in turn, one after the other and in another order each
time, in one run and on the same bytes. A ratio is the median of those of such pairs; in parentheses are
the least and the greatest.

- %d processors (%s), Linux %s
- %s, %s, distribution 3.1.2, docker-registry %s, %s, containerd 2.4.2
`, "`make bench`", runtime.NumCPU(), cpu, unix.ByteSliceToString(u.Release[:]), runtime.Version(),
		strings.Replace(first("/usr/sbin/nginx", "-v"), "nginx version: ", "", 1), first("dpkg-query", "-W", "-f", "${Version}", "docker-registry"),
		first("/usr/sbin/dockerd", "--version"))
}

// revision names what is measured: a commit, and whether more than the results
// was changed since.
func revision() string {
	commit, err := exec.Command("git", "rev-parse", "--short", "HEAD").Output()
	if err != nil {
		return "of an unknown revision"
	}
	changes, err := exec.Command("git", "status", "--porcelain", "--", ":/", ":(exclude)*.svg", ":(exclude)RESULTS.md").Output()
	if err != nil || len(changes) > 0 {
		return strings.TrimSpace(string(commit)) + " with changes"
	}
	return strings.TrimSpace(string(commit))
}

// sample is one measurement: those of its fields that it is about.
type sample struct {
	seconds  float64
	bytes    int64
	cpu      float64   // seconds, of what is measured alone
	first    []float64 // seconds to the first byte, of each request
	p50, p99 float64   // seconds
	rate     float64   // requests a second
}

// What samples are compared by.
func seconds(s sample) float64    { return s.seconds }
func throughput(s sample) float64 { return float64(s.bytes) / (1 << 20) / s.seconds } // MiB/s
func cpuPerGiB(s sample) float64  { return s.cpu / (float64(s.bytes) / (1 << 30)) }
func rate(s sample) float64       { return s.rate }

// turns calls each function once a round, in another order each time, and
// returns what they return by function and round.
func turns(rounds int, funcs ...func() sample) [][]sample {
	all := make([][]sample, len(funcs))
	for round := range rounds {
		for i := range funcs {
			if round%2 == 1 {
				i = len(funcs) - 1 - i
			}
			all[i] = append(all[i], funcs[i]())
		}
	}
	return all
}

// ratios are those of pairs of measurements.
type ratios []float64

// compare returns the ratios of a to b.
func compare(a, b []sample, f func(sample) float64) (r ratios) {
	for i := range a {
		r = append(r, f(a[i])/f(b[i]))
	}
	return r
}

func (r ratios) String() string {
	return fmt.Sprintf("%.3f (%.3f–%.3f)", quantile(r, 0.5), slices.Min(r), slices.Max(r))
}

func quantile(of []float64, q float64) float64 {
	s := slices.Sorted(slices.Values(of))
	if len(s) == 0 {
		return math.NaN()
	}
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 == len(s) {
		return s[i]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}

func median(of []sample, f func(sample) float64) float64 {
	var all []float64
	for _, s := range of {
		all = append(all, f(s))
	}
	return quantile(all, 0.5)
}

// first is the median time to the first byte of all requests of samples.
func first(of []sample) float64 {
	var all []float64
	for _, s := range of {
		all = append(all, s.first...)
	}
	return quantile(all, 0.5)
}

// reached says whether a figure is what it should be.
func reached(ok bool) string {
	if ok {
		return "reached"
	}
	return "**missed**"
}

func f0(v float64) string { return fmt.Sprintf("%.0f", v) }
func f2(v float64) string { return fmt.Sprintf("%.2f", v) }
func f3(v float64) string { return fmt.Sprintf("%.3f", v) }
func ms(v float64) string { return fmt.Sprintf("%.2f", v*1000) }
func mib(n int64) string  { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }

func sizeText(n int64) string {
	for _, u := range []struct {
		shift uint
		name  string
	}{{30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if n >= 1<<u.shift {
			return fmt.Sprintf("%d %s", n>>u.shift, u.name)
		}
	}
	return fmt.Sprintf("%d B", n)
}
