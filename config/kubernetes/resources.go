package kubernetes

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// groupResource is "resource.group"; the core group is empty, and "*" stands for all resources of a
// group, or for all groups.
type groupResource struct{ group, resource string }

var everything = groupResource{"*", "*"}

func parseResource(s string) groupResource {
	resource, group, _ := strings.Cut(s, ".")
	return groupResource{group, resource}
}

func (g groupResource) String() string {
	if g.group == "" && g.resource != "*" {
		return g.resource
	}
	return g.resource + "." + g.group
}

var (
	resourceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	groupName    = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	// unnamed are what the API server stores in addition to resources, and never encrypts.
	unnamed = []string{"apiserveripinfo", "serviceipallocations", "servicenodeportallocations"}
)

// resources checks the resources of an entry as kube-apiserver does.
func (r *reader) resources(e *Entry, at string) {
	seen := map[groupResource]bool{}
	for i, s := range e.Resources {
		g := parseResource(s)
		bad := func(hint, text string, args ...any) {
			r.report(e.lines[i], fmt.Sprintf("%s[%d]", at, i), hint, text, args...)
		}
		switch {
		case s == "*":
			bad("write '*.' for the core group or '*.*' for all", "\"*\" is ambiguous")
		case g.group == "events.k8s.io":
			bad("write events", "events are stored as those of the core group")
		case g.group == "extensions":
			bad("name the group that the resource is in now", "the group extensions is gone")
		case slices.Contains(unnamed, s):
			bad("remove it", "is not a resource, and is never encrypted")
		case g.group == "*" && g.resource != "*":
			bad("name the group", "one resource of all groups cannot be named")
		case g.resource != "*" && !resourceName.MatchString(g.resource) || g.group != "*" && g.group != "" && !groupName.MatchString(g.group):
			bad("write resource, resource.group, '*.group', '*.' or '*.*', in lower case", "%q is not a resource", s)
		case seen[g]:
			bad("remove one of them", "%q is in the list twice", s)
		}
		seen[g] = true
	}
	for i, s := range e.Resources {
		g := parseResource(s)
		if len(e.Resources) > 1 && seen[everything] && g != everything || g.resource != "*" && seen[groupResource{g.group, "*"}] {
			r.report(e.lines[i], fmt.Sprintf("%s[%d]", at, i), "remove it, or give it an entry before", "%q is covered by a wildcard of the same list", s)
		}
	}
}

// checkWildcards refuses what an earlier wildcard leaves without effect, as kube-apiserver does.
func (r *reader) checkWildcards(c *Configuration) {
	set := map[groupResource]bool{}
	for i, e := range c.Entries {
		for j, s := range e.Resources {
			g := parseResource(s)
			for _, wild := range []groupResource{{g.group, "*"}, everything} {
				if set[wild] {
					r.report(e.lines[j], fmt.Sprintf("resources[%d].resources[%d]", i, j), "move its entry before that of the wildcard", "%q has no effect: an earlier entry has %q", s, wild)
					break
				}
			}
		}
		for _, s := range e.Resources {
			set[parseResource(s)] = true
		}
	}
}

// exceptions are the resources that are not stored below their names
// (SpecialDefaultResourcePrefixes of kube-apiserver).
var exceptions = map[groupResource]string{
	{"", "replicationcontrollers"}:     "controllers",
	{"", "endpoints"}:                  "services/endpoints",
	{"", "nodes"}:                      "minions",
	{"", "services"}:                   "services/specs",
	{"networking.k8s.io", "ingresses"}: "ingress",
	{"policy", "podsecuritypolicies"}:  "podsecuritypolicy", // until 1.24
}

// neverEncrypted are the places of what kube-apiserver stores in addition to resources and never
// encrypts, with '*.*' neither.
var neverEncrypted = []string{"masterleases/", "peerserverleases/", "ranges/"}

// grouped are the groups of kube-apiserver that are stored like custom resources, below the group's
// name.
var grouped = []string{"apiextensions.k8s.io", "apiregistration.k8s.io"}

// builtin are the resources that kube-apiserver 1.37 stores itself, by group, those of alpha and
// beta versions too. All others are custom resources.
var builtin = map[string][]string{
	"": {"configmaps", "endpoints", "events", "limitranges", "namespaces", "nodes", "persistentvolumeclaims", "persistentvolumes", "pods", "podtemplates",
		"replicationcontrollers", "resourcequotas", "secrets", "serviceaccounts", "services"},
	"admissionregistration.k8s.io": {"mutatingadmissionpolicies", "mutatingadmissionpolicybindings", "mutatingwebhookconfigurations",
		"validatingadmissionpolicies", "validatingadmissionpolicybindings", "validatingwebhookconfigurations"},
	"apiextensions.k8s.io":         {"customresourcedefinitions"},
	"apiregistration.k8s.io":       {"apiservices"},
	"apps":                         {"controllerrevisions", "daemonsets", "deployments", "replicasets", "statefulsets"},
	"autoscaling":                  {"horizontalpodautoscalers"},
	"batch":                        {"cronjobs", "jobs"},
	"certificates.k8s.io":          {"certificatesigningrequests", "clustertrustbundles", "podcertificaterequests"},
	"coordination.k8s.io":          {"leasecandidates", "leases"},
	"discovery.k8s.io":             {"endpointslices"},
	"flowcontrol.apiserver.k8s.io": {"flowschemas", "prioritylevelconfigurations"},
	"internal.apiserver.k8s.io":    {"storageversions"},
	"lifecycle.k8s.io":             {"evictionrequests", "evictions"},
	"networking.k8s.io":            {"ingressclasses", "ingresses", "ipaddresses", "networkpolicies", "servicecidrs"},
	"node.k8s.io":                  {"runtimeclasses"},
	"policy":                       {"poddisruptionbudgets"},
	"rbac.authorization.k8s.io":    {"clusterrolebindings", "clusterroles", "rolebindings", "roles"},
	"resource.k8s.io": {"deviceclasses", "devicetaintrules", "resourceclaims", "resourceclaimtemplates", "resourcepoolstatusrequests",
		"resourceslices"},
	"scheduling.k8s.io":       {"compositepodgroups", "podgroups", "priorityclasses", "workloads"},
	"storage.k8s.io":          {"csidrivers", "csinodes", "csistoragecapacities", "storageclasses", "volumeattachments", "volumeattributesclasses"},
	"storagemigration.k8s.io": {"storageversionmigrations"},
}

// version is that of kube-apiserver which builtin is from.
const version = "1.37"

// place is where resources are stored, below the API server's prefix.
type place struct {
	prefix string // "secrets/" for example
	note   string // what is not exact about it; may be empty
}

// places returns where g is stored. Wildcards of the core group and of kube-apiserver's own groups
// are the resources that are known.
func places(g groupResource) []place {
	own, isOwn := builtin[g.group]
	switch {
	case g == everything:
		return []place{{prefix: ""}}
	case slices.Contains(grouped, g.group), !isOwn:
		if g.resource == "*" {
			return []place{{prefix: g.group + "/"}}
		}
		return []place{{prefix: g.group + "/" + g.resource + "/"}}
	case g.resource == "*":
		ps := make([]place, len(own))
		for i, resource := range own {
			ps[i] = place{prefix: storedAs(groupResource{g.group, resource})}
		}
		ps[0].note = fmt.Sprintf("%q is every resource of its group that Kubernetes %s has; a later one needs a rule of its own", g, version)
		return ps
	}
	p := place{prefix: storedAs(g)}
	if !slices.Contains(own, g.resource) && exceptions[g] == "" {
		p.note = fmt.Sprintf("%q is not a resource of Kubernetes %s: if it is a custom resource, its prefix is …/%s/%s/", g, version, g.group, g.resource)
		if g.group == "" {
			p.note = fmt.Sprintf("%q is not a resource of Kubernetes %s: for a custom resource, its group is missing", g, version)
		}
	}
	return []place{p}
}

func storedAs(g groupResource) string {
	if special, ok := exceptions[g]; ok {
		return special + "/"
	}
	return g.resource + "/"
}
