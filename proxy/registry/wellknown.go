// SPDX-License-Identifier: Apache-2.0

package registry

import "slices"

// WellKnown are registries that are known by their names. weir's CA may speak for
// all of these and for nothing else, so what is here has been looked at for what
// else the host serves. A host with more than a registry (jfrog.io, SWR) is here
// only where that is for its users, too: what isn't the distribution API passes
// as it is.
//
// A host that isn't here isn't lost: it is learned when it is first used.
var WellKnown = slices.Concat([]Known{
	{Host: DockerHub, Name: DockerHubName, Worldwide: true},
	{Host: dockerHubIndex, Worldwide: true},
	{Host: "dhi.io", Worldwide: true}, // docs.docker.com/dhi/how-to/use
	{Host: "ghcr.io", Worldwide: true},
	{Host: "quay.io", Worldwide: true},
	{Host: "registry.k8s.io", Worldwide: true},
	{Host: "gcr.io", Subtree: true}, // mirror.gcr.io, REGION.gcr.io, marketplace.gcr.io
	{Host: "pkg.dev", Subtree: true},
	{Host: "mcr.microsoft.com", Worldwide: true},
	{Host: "azurecr.io", Subtree: true},
	{Host: "azurecr.cn", Below: true}, // learn.microsoft.com/azure/china/resources-developer-guide
	{Host: "azurecr.us", Below: true}, // learn.microsoft.com/azure/azure-government/compare-azure-government-global-azure
	{Host: "public.ecr.aws", Worldwide: true},
	{Host: "ecr-public.aws.com", Worldwide: true}, // the same over IPv6: docs.aws.amazon.com/general/latest/gr/ecr-public.html
	{Host: "registry.gitlab.com", Worldwide: true},
	{Host: "docker.elastic.co", Worldwide: true},
	{Host: "nvcr.io", Worldwide: true},
	{Host: "cgr.dev", Worldwide: true},
	{Host: "lscr.io", Worldwide: true},
	{Host: "registry.access.redhat.com", Worldwide: true},
	{Host: "registry.redhat.io", Worldwide: true},
	{Host: "registry.opensuse.org", Worldwide: true},
	{Host: "registry.suse.com", Worldwide: true}, // documentation.suse.com/container/all/html/Container-guide
	{Host: "docker.redpanda.com", Worldwide: true},
	{Host: "container-registry.oracle.com", Worldwide: true}, // docs.oracle.com/en/operating-systems/oracle-linux/docker
	{Host: "ocir.io", Below: true},                           // REGION and REGION-KEY: docs.oracle.com/iaas/Content/Registry/Concepts/registryprerequisites.htm
	{Host: "icr.io", Subtree: true},                          // REGION, cp, private.REGION: cloud.ibm.com/docs/Registry?topic=Registry-registry_overview
	{Host: "registry.digitalocean.com"},                      // docs.digitalocean.com/products/container-registry
	{Host: "jfrog.io", Below: true},                          // a company's Artifactory each, with its other APIs: jfrog.com/help
	{Host: "cr.aliyuncs.com", Below: true},                   // alibabacloud.com/help/en/acr; its API is at cr.REGION.aliyuncs.com
	{Host: "tencentcloudcr.com", Below: true},                // tencentcloud.com/document/product/1051
	{Host: "ccr.ccs.tencentyun.com", Subtree: true},          // the same, personal edition
}, huawei(), ecr())

// huawei are the hosts of SWR: swr.REGION.myhuaweicloud.com
// (support.huaweicloud.com/intl/en-us/usermanual-swr). Its regions are those of
// huaweicloud-sdk-go-v3.
func huawei() (all []Known) {
	for _, region := range []string{
		"af-south-1", "ap-southeast-1", "ap-southeast-2", "ap-southeast-3", "ap-southeast-4", "cn-east-2", "cn-east-3", "cn-north-1",
		"cn-north-4", "cn-north-9", "cn-south-1", "cn-southwest-2", "la-north-2", "la-south-2", "na-mexico-1", "sa-brazil-1", "tr-west-1",
	} {
		all = append(all, Known{Host: "swr." + region + ".myhuaweicloud.com"})
	}
	return all
}

// ecr are the private registries of Amazon ECR, ACCOUNT.dkr.ecr.REGION.amazonaws.com
// and what there is beside that: docs.aws.amazon.com/general/latest/gr/ecr.html. The
// regions are those of aws-sdk-go-v2 1.48, partitions.json, without the secret ones.
// The APIs have other names (api.ecr.REGION.amazonaws.com).
func ecr() (all []Known) {
	add := func(host string) { all = append(all, Known{Host: host, Below: true}) }
	for _, region := range []string{
		"af-south-1", "ap-east-1", "ap-east-2", "ap-northeast-1", "ap-northeast-2", "ap-northeast-3", "ap-south-1", "ap-south-2",
		"ap-southeast-1", "ap-southeast-2", "ap-southeast-3", "ap-southeast-4", "ap-southeast-5", "ap-southeast-6", "ap-southeast-7",
		"ca-central-1", "ca-west-1", "eu-central-1", "eu-central-2", "eu-north-1", "eu-south-1", "eu-south-2", "eu-west-1", "eu-west-2",
		"eu-west-3", "il-central-1", "me-central-1", "me-south-1", "me-west-1", "mx-central-1", "sa-east-1", "sa-west-1",
		"us-east-1", "us-east-2", "us-west-1", "us-west-2", "us-gov-east-1", "us-gov-west-1",
	} {
		add("dkr.ecr." + region + ".amazonaws.com")
		add("dkr-ecr." + region + ".on.aws")
	}
	for _, region := range []string{"us-east-1", "us-east-2", "us-west-1", "us-west-2", "us-gov-east-1", "us-gov-west-1"} {
		add("dkr.ecr-fips." + region + ".amazonaws.com")
		add("dkr-ecr-fips." + region + ".on.aws")
	}
	for _, region := range []string{"cn-north-1", "cn-northwest-1"} {
		add("dkr.ecr." + region + ".amazonaws.com.cn")
		add("dkr-ecr." + region + ".on.amazonwebservices.com.cn")
	}
	add("dkr.ecr.eusc-de-east-1.amazonaws.eu")
	return all
}
