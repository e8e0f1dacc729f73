package kubernetes

import (
	"maps"
	"slices"
	"strings"
)

// kinds maps the folders in which kube-apiserver stores its built-in resources to the kinds of
// their objects. It leaves out objects that are stored as JSON and so cannot be recognized by their
// kind in protobuf (custom resources, their definitions and API services), and Endpoints, of which
// the API server stores some that are no resources and never encrypted.
var kinds = map[string]string{
	"certificatesigningrequests": "CertificateSigningRequest", "clusterrolebindings": "ClusterRoleBinding", "clusterroles": "ClusterRole",
	"clustertrustbundles": "ClusterTrustBundle", "compositepodgroups": "CompositePodGroup", "configmaps": "ConfigMap", "controllerrevisions": "ControllerRevision",
	"controllers": "ReplicationController", "cronjobs": "CronJob", "csidrivers": "CSIDriver", "csinodes": "CSINode", "csistoragecapacities": "CSIStorageCapacity",
	"daemonsets": "DaemonSet", "deployments": "Deployment", "deviceclasses": "DeviceClass", "devicetaintrules": "DeviceTaintRule", "endpointslices": "EndpointSlice",
	"events": "Event", "evictionrequests": "EvictionRequest", "evictions": "Eviction", "flowschemas": "FlowSchema", "horizontalpodautoscalers": "HorizontalPodAutoscaler",
	"ingress": "Ingress", "ingressclasses": "IngressClass", "ipaddresses": "IPAddress", "jobs": "Job", "leasecandidates": "LeaseCandidate", "leases": "Lease",
	"limitranges": "LimitRange", "minions": "Node", "mutatingadmissionpolicies": "MutatingAdmissionPolicy",
	"mutatingadmissionpolicybindings": "MutatingAdmissionPolicyBinding", "mutatingwebhookconfigurations": "MutatingWebhookConfiguration", "namespaces": "Namespace",
	"networkpolicies": "NetworkPolicy", "persistentvolumeclaims": "PersistentVolumeClaim", "persistentvolumes": "PersistentVolume",
	"podcertificaterequests": "PodCertificateRequest", "poddisruptionbudgets": "PodDisruptionBudget", "podgroups": "PodGroup", "pods": "Pod",
	"podtemplates": "PodTemplate", "priorityclasses": "PriorityClass", "prioritylevelconfigurations": "PriorityLevelConfiguration", "replicasets": "ReplicaSet",
	"resourceclaims": "ResourceClaim", "resourceclaimtemplates": "ResourceClaimTemplate", "resourcepoolstatusrequests": "ResourcePoolStatusRequest",
	"resourcequotas": "ResourceQuota", "resourceslices": "ResourceSlice", "rolebindings": "RoleBinding", "roles": "Role", "runtimeclasses": "RuntimeClass",
	"secrets": "Secret", "serviceaccounts": "ServiceAccount", "servicecidrs": "ServiceCIDR", "services/specs": "Service", "statefulsets": "StatefulSet",
	"storageclasses": "StorageClass", "storageversionmigrations": "StorageVersionMigration", "storageversions": "StorageVersion",
	"validatingadmissionpolicies": "ValidatingAdmissionPolicy", "validatingadmissionpolicybindings": "ValidatingAdmissionPolicyBinding",
	"validatingwebhookconfigurations": "ValidatingWebhookConfiguration", "volumeattachments": "VolumeAttachment", "volumeattributesclasses": "VolumeAttributesClass",
	"workloads": "Workload",
}

// Kinds returns the kinds of objects below a prefix of etcd that can be told by their bytes, like
// Secret of /registry/secrets/, in order. all reports whether these are all that are stored there.
func Kinds(prefix string) (known []string, all bool) {
	parts := strings.Split(strings.Trim(prefix, "/"), "/")
	for i := range parts { // the first that is one: behind it there are namespaces and names
		for _, n := range []int{2, 1} {
			if i+n <= len(parts) {
				if kind, ok := kinds[strings.Join(parts[i:i+n], "/")]; ok {
					return []string{kind}, true
				}
			}
		}
	}
	// every resource, custom ones too
	if root := strings.Join(parts, "/"); root == "" || root == "registry" {
		return slices.Sorted(maps.Values(kinds)), false
	}
	return nil, false
}
