// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"weir/proxy/registry"
)

// fields are the names of all fields of a type's JSON, each with its path.
func fields(typ reflect.Type, path string, into map[string]bool) {
	switch typ.Kind() {
	case reflect.Pointer:
		fields(typ.Elem(), path, into)
	case reflect.Slice:
		fields(typ.Elem(), path+"[]", into)
	case reflect.Struct:
		if typ == reflect.TypeFor[time.Time]() {
			return
		}
		for f := range typ.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if f.Anonymous && name == "" {
				fields(f.Type, path, into)
				continue
			}
			if name == "" {
				name = "no name of its own: " + f.Name
			}
			at := strings.TrimPrefix(path+"."+name, ".")
			into[at] = true
			fields(f.Type, at, into)
		}
	}
}

// What people's scripts read keeps its names: deploy/API.md has each field of
// the JSON, and no other.
func TestAPIDocument(t *testing.T) {
	b, err := os.ReadFile("../../deploy/API.md")
	if err != nil {
		t.Fatal(err)
	}
	_, doc, _ := strings.Cut(string(b), "\n## ")
	for section := range strings.SplitSeq(doc, "\n## ") {
		path, text, _ := strings.Cut(section, "\n")
		typ := map[string]reflect.Type{"/api/status": reflect.TypeFor[Status](), "/api/pulls": reflect.TypeFor[[]registry.Pull](), "/api/cluster": reflect.TypeFor[Cluster](), "/api/registries": reflect.TypeFor[[]Registry]()}[path]
		if typ == nil {
			t.Errorf("%q is nothing that the agent answers", path)
			continue
		}
		have, said := make(map[string]bool), make(map[string]bool)
		fields(typ, "", have)
		for _, m := range regexp.MustCompile("(?m)^\\| ((`[a-z_.\\[\\]]+`(, )?)+) \\|").FindAllStringSubmatch(text, -1) {
			prefix := ""
			for name := range strings.SplitSeq(m[1], ", ") {
				name = strings.Trim(name, "`")
				// A name without a path is beside the one before.
				if dot := strings.LastIndex(name, "."); dot >= 0 {
					prefix = name[:dot+1]
				} else {
					name = prefix + name
				}
				said[name] = true
				if !have[name] {
					t.Errorf("%s has no %s", path, name)
				}
			}
		}
		for name := range have {
			if !said[name] && !strings.HasPrefix(name, "nodes[].history") { // emptied
				t.Errorf("deploy/API.md doesn't say what %s of %s is", name, path)
			}
		}
	}
}
