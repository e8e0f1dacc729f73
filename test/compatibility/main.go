// Command compatibility generates the tables of docs/design/compatibility.md from the results of
// tests ([harness.Tested]): the methods and paths that were called on each version of etcd,
// directly and through the proxy, with the same response, and those that real clients have used. It
// fails if no test has called a method or path.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/genproto/googleapis/api/annotations"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	begin        = "<!-- make compatibility writes the tables from here on. -->\n"
	clientsTitle = "\n### Clients\n"
	end          = "<!-- make compatibility writes the tables up to here. -->\n"
)

func main() {
	results := flag.String("results", "", "`folder` that tests wrote to")
	check := flag.String("check", "", "fail if the tables in this `file` are not these")
	write := flag.String("write", "", "put the tables into this `file`")
	flag.Parse()
	if err := run(*results, cmp.Or(*check, *write), *write != ""); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(results, file string, write bool) error {
	t, err := read(results)
	if err != nil {
		return err
	}
	tables, err := t.render()
	if err != nil {
		return err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(data), begin)
	_, tail, also := strings.Cut(rest, end)
	if !ok || !also {
		return fmt.Errorf("%s: no marks of where the tables stand", file)
	}
	if write {
		return os.WriteFile(file, []byte(head+begin+tables+end+tail), 0o644)
	}
	// What a client calls depends on its timers, too: it is enough that each has called something.
	existing, _, _ := strings.Cut(rest, clientsTitle)
	passed, _, _ := strings.Cut(tables, clientsTitle)
	if existing != passed {
		return fmt.Errorf("%s does not say what has passed: run make compatibility and read the difference", file)
	}
	return nil
}

// tested is what has passed, by row and column; false where etcd does not know the method, and the
// proxy says so.
type tested map[string]map[string]bool

func read(dir string) (tested, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no results in %q: run make e2e first", dir)
	}
	t := make(tested)
	for _, name := range files {
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(file)
		for lines.Scan() {
			var c harness.Tested
			if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			if t[c.Row] == nil {
				t[c.Row] = make(map[string]bool)
			}
			t[c.Row][c.Column] = t[c.Row][c.Column] || !c.Absent
		}
		if err := errors.Join(lines.Err(), file.Close()); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return t, nil
}

// render writes the tables, and fails if a cell of the first two is empty.
func (t tested) render() (string, error) {
	var out strings.Builder
	var missing []string
	table := func(what string, rows []string, show func(string) string) {
		fmt.Fprintf(&out, "| %s | %s |\n|---|%s\n", what, strings.Join(versions, " | "), strings.Repeat("---|", len(versions)))
		for _, row := range rows {
			fmt.Fprintf(&out, "| `%s` |", show(row))
			for _, v := range versions {
				present, ok := t[row]["etcd "+v]
				mark := "–"
				switch {
				case !ok:
					missing = append(missing, row+" on etcd "+v)
				case present:
					mark = "✓"
				}
				fmt.Fprintf(&out, " %s |", mark)
			}
			out.WriteString("\n")
		}
	}
	out.WriteString("\n### gRPC methods\n\n" +
		"✓: the proxy responds as etcd of that version does. –: that version does not have the method or\n" +
		"path, and the proxy responds as it does.\n\n")
	table("method", methods(), short)
	out.WriteString("\n### HTTP paths\n\n")
	table("path", paths(), func(row string) string { return row })
	out.WriteString(clientsTitle +
		"\nThe clients are unmodified, and every key that they use is under a rule. The table lists the methods\n" +
		"and paths that they called successfully.\n\n" +
		"| client | methods and paths |\n|---|---|\n")
	clients := make(map[string][]string)
	for row, columns := range t {
		for column, present := range columns {
			if present && !strings.HasPrefix(column, "etcd ") {
				clients[column] = append(clients[column], short(row))
			}
		}
	}
	for _, c := range slices.Sorted(maps.Keys(clients)) {
		slices.Sort(clients[c])
		fmt.Fprintf(&out, "| %s | %s |\n", c, strings.Join(clients[c], ", "))
	}
	for _, c := range expected {
		if len(clients[c]) == 0 {
			missing = append(missing, "the client "+c)
		}
	}
	out.WriteString("\n")
	if len(missing) > 0 {
		return "", fmt.Errorf("no test has passed that calls\n  %s", strings.Join(missing, "\n  "))
	}
	return out.String(), nil
}

var (
	versions = []string{"3.4", "3.5", "3.6", "3.7", "3.8"}
	// expected are the clients that there are tests of.
	expected = []string{"etcdctl 3.5", "etcdctl 3.6", "etcdctl 3.7", "etcdctl 3.8", "etcd's Go client", "kube-apiserver", "kube-apiserver on kine", "python3-etcd3", "python3-etcd3gw", "npm's etcd3", "curl"}
)

func short(row string) string {
	return strings.TrimPrefix(strings.TrimPrefix(row, "/etcdserverpb."), "/")
}

func services() (all []protoreflect.ServiceDescriptor) {
	for _, file := range []protoreflect.FileDescriptor{pb.File_rpc_proto, v3electionpb.File_v3election_proto, v3lockpb.File_v3lock_proto, healthpb.File_grpc_health_v1_health_proto} {
		for i := range file.Services().Len() {
			all = append(all, file.Services().Get(i))
		}
	}
	return all
}

// methods are all that the descriptors of etcd's server name.
func methods() (rows []string) {
	for _, s := range services() {
		for i := range s.Methods().Len() {
			rows = append(rows, fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(i).Name()))
		}
	}
	return rows
}

// paths are all of etcd's gateway, as the descriptors have them, and what etcd serves besides.
func paths() (rows []string) {
	for _, s := range services() {
		for i := range s.Methods().Len() {
			rule, _ := proto.GetExtension(s.Methods().Get(i).Options(), annotations.E_Http).(*annotations.HttpRule)
			for _, r := range append([]*annotations.HttpRule{rule}, rule.GetAdditionalBindings()...) {
				if r.GetPost() != "" {
					rows = append(rows, "POST "+r.GetPost())
				}
			}
		}
	}
	return append(rows, "GET /health", "GET /livez", "GET /readyz", "GET /version", "GET /metrics")
}
