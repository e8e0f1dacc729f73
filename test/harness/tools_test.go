package harness

import (
	"debug/buildinfo"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var required = regexp.MustCompile(`(?m)^\s*(?:require )?(\S+) (v\S+)(?: // indirect)?$`)

// pinned returns the versions in the go.mod of a tool's module.
func pinned(t *testing.T, tool string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "tools", tool, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	versions := make(map[string]string)
	for _, m := range required.FindAllStringSubmatch(string(data), -1) {
		versions[m[1]] = m[2]
	}
	return versions
}

// printedVersion returns the version that a tool prints.
func printedVersion(t *testing.T, bin string, args ...string) string {
	t.Helper()
	out, err := exec.Command(Bin(t, bin), args...).CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v", bin, args, err)
	}
	return string(out)
}

// TestEtcdVersions checks that each etcd and etcdctl is of the version in its name, with all of
// etcd's modules of that version. An alpha of etcd's server requires earlier versions of the other
// modules.
func TestEtcdVersions(t *testing.T) {
	for _, minor := range Versions(t) {
		if minor == "3.4" { // Debian's package
			if out := printedVersion(t, "etcd-3.4", "--version"); !strings.HasPrefix(out, "etcd Version: 3.4.") {
				t.Errorf("etcd-3.4 is %q", out)
			}
			continue
		}
		versions := pinned(t, "etcd-"+minor)
		want := versions["go.etcd.io/etcd/server/v3"]
		if !strings.HasPrefix(want, "v"+minor+".") {
			t.Errorf("etcd-%s is of server %q", minor, want)
		}
		for module, version := range versions {
			if strings.HasPrefix(module, "go.etcd.io/etcd/") && strings.HasSuffix(module, "/v3") && version != want {
				t.Errorf("etcd-%s has %s %s, want %s", minor, module, version, want)
			}
		}
		plain := strings.TrimPrefix(want, "v")
		if out := printedVersion(t, "etcd-"+minor, "--version"); !strings.HasPrefix(out, "etcd Version: "+plain+"\n") {
			t.Errorf("etcd-%s printedVersion %q, want %s", minor, out, plain)
		}
		if out := printedVersion(t, "etcdctl-"+minor, "version"); !strings.HasPrefix(out, "etcdctl version: "+plain+"\n") {
			t.Errorf("etcdctl-%s printedVersion %q, want %s", minor, out, plain)
		}
	}
}

// TestToolsAreAsPinned checks that every tool was built from the modules that its go.mod pins, and
// so not before a change of it.
func TestToolsAreAsPinned(t *testing.T) {
	// by their folder
	tools := map[string]string{"kube-apiserver": "kube-apiserver", "kubectl": "kube-apiserver", "kine": "kine"}
	for _, minor := range Versions(t) {
		if minor != "3.4" {
			tools["etcd-"+minor], tools["etcdctl-"+minor] = "etcd-"+minor, "etcd-"+minor
		}
	}
	for bin, folder := range tools {
		info, err := buildinfo.ReadFile(Bin(t, bin))
		if err != nil {
			t.Errorf("%s: %v", bin, err)
			continue
		}
		want := pinned(t, folder)
		for _, dep := range info.Deps {
			if version := want[dep.Path]; version != "" && version != dep.Version {
				t.Errorf("%s has %s %s, and %s/go.mod pins %s: build it again with `make tools`", bin, dep.Path, dep.Version, folder, version)
			}
		}
	}
	if out, want := printedVersion(t, "kube-apiserver", "--version"), pinned(t, "kube-apiserver")["k8s.io/kubernetes"]; out != "Kubernetes "+want+"\n" {
		t.Errorf("kube-apiserver printedVersion %q, want %s", out, want)
	}
}
