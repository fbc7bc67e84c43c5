// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"weir/test/lab"
)

// documents have commands that people type.
var documents = []string{"README.md", "deploy/README.md", "deploy/API.md", ".github/CONTRIBUTING.md"}

// elsewhere are the commands of the documents that TestCommands doesn't run, by
// how they begin, each with the test that does or what it would take.
var elsewhere = map[string]string{
	"make test":                "this test is a part of it, and CI runs it",
	"make lint":                "takes minutes; changes nothing on a node",
	"make vulncheck":           "needs the Go module proxy; CI runs it",
	"make demo":                "TestDemo",
	"go test ":                 "this is one",
	"docker build -t ":         "needs golang's image from Docker Hub",
	"make dist publish ":       "TestChart",
	"helm install ":            "TestChart",
	"helm upgrade ":            "TestChart",
	"helm uninstall ":          "TestChart",
	"sudo bin/weir install":    "TestInstall, with systemd",
	"weir install":             "TestInstall, with systemd",
	"kubectl ":                 "needs a cluster: TestChart has one, and waits and looks in its own way",
	"systemctl restart docker": "a lab's node has no systemd: TestRunningBefore and TestAgentInContainer restart dockerd",
}

// listed is how a command begins that is run elsewhere.
func listed(command string) string {
	for start := range elsewhere {
		if strings.HasPrefix(command, start) {
			return start
		}
	}
	return ""
}

// Each command of the documents is run as it is written there, on a node, from
// top to bottom, or is one that is listed above.
func TestCommands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Registry("registry.example.com")
	w.hub.Push("library/debian:12", lab.Image{Layers: []int{500_000}, Seed: 7})
	node := w.Node()
	docker := node.Docker("--cgroup-parent=" + filepath.Base(node.Cgroup()))
	image(t, node)
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	goroot, err := exec.Command("go", "env", "GOROOT", "GOCACHE", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	dirs := strings.Fields(string(goroot))
	env := []string{"WEIR_CGROUP=" + node.Cgroup(), "PATH=" + filepath.Dir(lab.Weir(t)) + ":" + dirs[0] + "/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"GOCACHE=" + dirs[1], "GOMODCACHE=" + dirs[2], "GOPROXY=off",
		// A node's /var/lib is its own, and which packages there are is this machine's.
		fmt.Sprintf("DPKG_ADMINDIR=/proc/%d/root/var/lib/dpkg", os.Getpid())}
	shell := func(command string) []string {
		dir := "/var/lib/home"
		if strings.HasPrefix(strings.TrimPrefix(command, "exec "), "make ") {
			dir = root
		}
		return append(append([]string{"env"}, env...), "sh", "-ec", "cd "+dir+"\n"+command)
	}
	// It may take longer than a node's commands.
	if out, err := exec.Command("make", "-C", root, "build").CombinedOutput(); err != nil {
		t.Fatalf("make build: %v\n%s", err, out)
	}
	// What the documents suppose to be there.
	node.WriteFile("/etc/ca.pem", w.Roots())
	node.WriteFile("/etc/weir/registries", "registry.example.com\n")
	node.Run("install", "-d", "-m", "700", "/var/lib/weir")
	node.WriteFile("/var/lib/weir/learned.json", `[{"host":"harbor.example.com","state":"learned","at":"2026-11-01T10:00:00Z","by":"dockerd"}]`)

	var agent *lab.Process
	stop := func() {
		if agent != nil {
			agent.Stop()
			agent = nil
		}
	}
	serves := func(command string) {
		t.Helper()
		if err := lab.Eventually(nil, func(context.Context) error { _, err := node.Output(lab.Weir(t), "status"); return err }); err != nil {
			log := ""
			if agent != nil {
				log = agent.Log(4 << 10)
			}
			t.Fatalf("%s: %v\n%s", command, err, log)
		}
	}
	needed := make(map[string]bool)
	for _, file := range documents {
		for _, command := range lab.Commands(t, filepath.Join(root, file)) {
			if start := listed(command); start != "" {
				needed[start] = true
				continue
			}
			t.Logf("%s: %s", file, command)
			switch {
			case command == "make run", strings.HasPrefix(command, "weir agent"):
				stop()
				agent = node.Spawn("weir", shell("exec "+command)...)
				serves(command)
			case strings.HasPrefix(command, "docker run --detach --name=weir "):
				stop()
				node.Run(shell(command)...)
				serves(command)
			case strings.Contains(command, "--watch"):
				p := node.Spawn("weir", shell("exec "+command)...)
				if err := lab.Eventually(nil, func(context.Context) error {
					if p.Log(1) == "" {
						return fmt.Errorf("%s shows nothing", command)
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
				p.Stop()
			default:
				if out, err := node.Output(shell(command)...); err != nil {
					t.Errorf("%s: %s: %v\n%s", file, command, err, out)
				}
			}
		}
	}
	stop()
	for start, why := range elsewhere {
		if !needed[start] {
			t.Errorf("no document has a command that begins with %q (%s)", start, why)
		}
	}
	docker.Pull(flyway) // and nothing is in the way
}

// Every test that a document names is there, and each row of the table of
// threats names one.
func TestDocumentsNameTests(t *testing.T) {
	have := tests(t, "../..")
	for _, file := range documents {
		b, err := os.ReadFile("../../" + file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`\bTest[A-Z]\w+`).FindAllString(string(b), -1) {
			if !have[name] {
				t.Errorf("%s names %s, which isn't there", file, name)
			}
		}
	}
	b, err := os.ReadFile("../../deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(b), "| who | may | may not | test |\n|---|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	if rows := strings.Split(table, "\n"); !found || len(rows) < 10 {
		t.Errorf("the table of threats isn't found: %q", table)
	} else {
		for _, row := range rows {
			if !regexp.MustCompile(`\| (Test\w+(, )?)+ \|$`).MatchString(row) {
				t.Errorf("no test is named for %s", row)
			}
		}
	}
}

// The architecture's document has every package in its table, and each name that it
// gives is there: a package, a file, a function of the kernel side, or what a package
// declares, as PACKAGE.NAME, TYPE.METHOD, both, or NAME alone.
func TestArchitecture(t *testing.T) {
	const root, document = "../../", ".github/ARCHITECTURE.md"
	b, err := os.ReadFile(root + document)
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := os.ReadFile(root + "bpf/weir.bpf.c")
	if err != nil {
		t.Fatal(err)
	}
	declared, packages := declarations(t, root)
	listed := make(map[string]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*`) \\|").FindAllStringSubmatch(string(b), -1) {
		for _, p := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			listed[p[1]] = true
		}
	}
	for _, p := range packages {
		if !listed[p] {
			t.Errorf("%s doesn't list the package %s", document, p)
		}
	}
	names := regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(string(b), -1)
	if len(names) < 80 {
		t.Errorf("%s gives %d names; are they looked for where they are?", document, len(names))
	}
	for _, name := range names {
		name := name[1]
		_, err := os.Stat(root + name)
		switch {
		case err == nil, name == "/v2/", declared[name]:
		case strings.HasPrefix(name, "weir_") && regexp.MustCompile(`\b`+regexp.QuoteMeta(name)+`[(,]`).Match(kernel):
		default:
			t.Errorf("%s names %s, which isn't there", document, name)
		}
	}
}

// declarations are what weir's packages declare, and in which directories those are.
func declarations(t *testing.T, root string) (declared map[string]bool, packages []string) {
	t.Helper()
	declared = make(map[string]bool)
	for _, top := range []string{"agent", "bpf", "p2p", "proxy"} {
		if err := filepath.WalkDir(root+top, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			if dir := strings.TrimPrefix(filepath.Dir(path), root); !strings.Contains(dir, "/internal/") && !slices.Contains(packages, dir) {
				packages = append(packages, dir)
			}
			declare := func(name string) { declared[name], declared[file.Name.Name+"."+name] = true, true }
			for _, d := range file.Decls {
				switch d := d.(type) {
				case *ast.FuncDecl:
					declare(d.Name.Name)
					if d.Recv != nil {
						of := regexp.MustCompile(`\w+`).FindString(types.ExprString(d.Recv.List[0].Type))
						declare(of + "." + d.Name.Name)
					}
				case *ast.GenDecl:
					for _, s := range d.Specs {
						switch s := s.(type) {
						case *ast.TypeSpec:
							declare(s.Name.Name)
						case *ast.ValueSpec:
							for _, n := range s.Names {
								declare(n.Name)
							}
						}
					}
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return declared, packages
}
